"""One collection of the shared store; docs/cache.md, "Collection", says why it is safe."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from offload_cache.collection.listing import StoreClock, list_projects
from offload_cache.collection.lock import CollectionLock
from offload_cache.collection.plan import longest_unused, used_at
from offload_cache.collection.project import (
    CollectionTerms,
    InterruptedCollectionError,
    ProjectCollection,
)
from offload_cache.collection.report import REPORT_KEY, CollectionReport
from offload_cache.collection.roots import RootReader
from offload_cache.collection.timing import MIN_GRACE_SECONDS
from offload_core.aio import TaskSet, finish
from offload_core.errors import CacheUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.collection.plan import Limits
    from offload_cache.collection.roots import Root
    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)

_RELEASE_SECONDS = 10.0


class Collector:
    """Collects all projects of a bucket.

    Args:
        objects: the shared store.
        owner: name of this node, for people.
        limits: what a project may keep.
        pool_keep_bytes: bound of the layers and images of all projects together; 0 for none.
        grace_seconds: how old a blob must be before it is deleted, and for how long a removed
            document still protects its blobs; at least an hour.
        clock: monotonic, in seconds.
        parallel_deletes: requests at a time.

    Raises:
        ConfigError: the grace is too short.
    """

    def __init__(
        self,
        objects: ObjectStore,
        owner: str,
        limits: Callable[[str], Limits],
        *,
        pool_keep_bytes: int = 0,
        grace_seconds: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
        parallel_deletes: int = 4,
    ) -> None:
        if grace_seconds < MIN_GRACE_SECONDS:
            raise ConfigError("the grace of a collection must be an hour or more")
        self._objects = objects
        self._owner = owner
        self._limits = limits
        self._pool_keep_bytes = pool_keep_bytes
        self._grace = timedelta(seconds=grace_seconds)
        self._clock = clock
        self._parallel = parallel_deletes
        self._reader = RootReader(objects)

    async def run(self) -> CollectionReport | None:
        """Collect every project, unless another node does so now; then return None.

        Raises:
            CacheUnavailableError: the store does not answer. What is left the next run does.
        """
        now = await StoreClock.read(self._objects, self._clock)
        lock = CollectionLock(self._objects, self._owner, clock=self._clock)
        if not await lock.acquire(now):
            return None
        tasks = TaskSet()
        tasks.start(lock.keep(), name="collection-lock")
        try:
            return await self._collect_all(now, lambda: lock.held)
        finally:
            await tasks.close()
            with contextlib.suppress(CacheUnavailableError):
                await finish(lock.release(), _RELEASE_SECONDS)

    async def _collect_all(self, now: StoreClock, allowed: Callable[[], bool]) -> CollectionReport:
        started = self._clock()
        report = CollectionReport(now.now(), self._owner)
        collected: list[ProjectCollection] = []
        project_ids = await list_projects(self._objects)
        self._reader.forget(project_ids)
        try:
            for project_id in project_ids:
                project = self.project(project_id, now, allowed)
                report.projects[project_id] = project.report
                if await self._collect(project):
                    collected.append(project)
            if self._pool_keep_bytes:
                await self._bound_pool(collected)
        except InterruptedCollectionError:
            report.complete = False
            _log.warning("cache.collection.interrupted", owner=self._owner)
        report.at = now.now()
        report.seconds = round(self._clock() - started, 3)
        if report.complete:
            await self._objects.write_bytes(REPORT_KEY, report.to_bytes())
        _log.info(
            "cache.collection.completed" if report.complete else "cache.collection.left",
            projects=len(report.projects),
            deleted_blobs=sum(found.deleted_blobs for found in report.projects.values()),
            deleted_bytes=sum(found.deleted_bytes for found in report.projects.values()),
            seconds=report.seconds,
        )
        return report

    @staticmethod
    async def _collect(project: ProjectCollection) -> bool:
        """Collect one project; False when something in it is so wrong that the others go first."""
        try:
            await project.run()
        except (InterruptedCollectionError, CacheUnavailableError):
            raise
        except Exception as error:  # noqa: BLE001 - the others shall be collected
            _log.error("cache.collection.stuck", project_id=project.project_id, error=repr(error))
            project.report.problem = f"it was not collected: {error!r}"
            return False
        return True

    def project(
        self, project_id: str, now: StoreClock, allowed: Callable[[], bool]
    ) -> ProjectCollection:
        """Return the collection of one project, to be run.

        Args:
            project_id: the project.
            now: the store's clock.
            allowed: asked before each deletion; when it says False, no more is deleted.
        """
        terms = CollectionTerms(self._owner, self._grace, now, allowed, self._clock, self._parallel)
        return ProjectCollection(
            self._objects, self._reader, project_id, self._limits(project_id), terms
        )

    async def _bound_pool(self, projects: list[ProjectCollection]) -> None:
        """Give up what was of no use for longest, of whatever project; its blobs go later."""
        order = sorted(
            (
                (used_at(root, project.used), root.name, project, root)
                for project in projects
                for root in project.kept
            ),
            key=lambda item: item[:2],
        )
        gone, _ = longest_unused(
            [(project.project_id, root) for _, _, project, root in order], self._pool_keep_bytes
        )
        leaving: defaultdict[str, list[Root]] = defaultdict(list)
        staying: defaultdict[str, list[Root]] = defaultdict(list)
        for number, (_, _, project, root) in enumerate(order):
            (leaving if number < gone else staying)[project.project_id].append(root)
        for project in projects:
            going = leaving[project.project_id]
            if not going:
                continue
            images = [root for root in going if root.is_image]
            await project.retire(root for root in going if not root.is_image)
            if images:
                await project.retire_images(images)
            kept = [("", root) for root in staying[project.project_id]]
            _, project.report.live_bytes = longest_unused(kept, 0)
