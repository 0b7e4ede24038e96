"""The collection of one project, from one listing to its last deletion."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from offload_cache.collection.condemned import CondemnedList, delete_each
from offload_cache.collection.documents import MAX_CONDEMNED, CondemnedDocument
from offload_cache.collection.plan import SweepPlan, plan_retention, plan_sweep
from offload_cache.collection.removal import retire_contribution, retire_image
from offload_cache.collection.report import ProjectReport
from offload_cache.collection.snapshot import read_snapshot
from offload_cache.collection.timing import CONDEMNED_SECONDS
from offload_cache.keys import blob_key, mount_key
from offload_cache.packs.sweep import delete_packs, valid_packs
from offload_cache.packs.sweep import plan_sweep as plan_pack_sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime, timedelta

    from offload_cache.collection.listing import StoreClock
    from offload_cache.collection.plan import Limits
    from offload_cache.collection.roots import ProjectRoots, Root, RootReader
    from offload_cache.collection.snapshot import ProjectSnapshot
    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)


class InterruptedCollectionError(Exception):
    """This node may not delete any more; another collection does what is left."""


@dataclass(frozen=True, slots=True)
class CollectionTerms:
    """What holds for a whole collection.

    Attributes:
        owner: name of this node, for people.
        grace: how old a blob must be before it goes; how long a removed document still counts.
        now: the store's clock.
        allowed: asked before each deletion.
        clock: monotonic, in seconds.
        parallel: deletions at a time.
    """

    owner: str
    grace: timedelta
    now: StoreClock
    allowed: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    parallel: int = 4


@dataclass(slots=True)
class ProjectCollection:
    """One project while it is collected.

    Attributes:
        objects: the shared store.
        reader: reads documents.
        project_id: the project.
        limits: what it may keep.
        terms: of the collection.
        report: what was done so far.
        kept: roots that stay.
        used: when a key of a scope was last of use, by scope and key.
    """

    objects: ObjectStore
    reader: RootReader
    project_id: str
    limits: Limits
    terms: CollectionTerms
    report: ProjectReport = field(default_factory=ProjectReport)
    kept: list[Root] = field(default_factory=list)
    used: dict[tuple[str, str], datetime] = field(default_factory=dict)

    async def run(self) -> None:
        """Remove what nothing needs.

        Raises:
            InterruptedCollectionError: this node may not go on.
            CacheUnavailableError: the store does not answer. What is left the next run does.
        """
        now = self.terms.now.now
        snapshot = await read_snapshot(self.objects, self.project_id)
        roots = await self.reader.read(snapshot)
        self.used = {name: info.modified_at for name, info in snapshot.used.items()}
        retention = plan_retention(roots.live, self.used, self.limits, now=now())
        self.kept = retention.kept
        self.report.live_bytes = retention.live_bytes
        await self.retire(root for root, _ in retention.removed if not root.is_image)
        plan = plan_sweep(snapshot, roots, now=now(), grace=self.terms.grace)
        self.report.garbage_bytes = plan.young_bytes + sum(plan.blobs.values())
        if not self._blocked(roots):
            await self._sweep(plan, [root for root, _ in retention.removed if root.is_image])
        await self._delete(plan.objects)
        await self._sweep_packs(snapshot)

    def _blocked(self, roots: ProjectRoots) -> bool:
        if roots.problems:
            self.report.problem = f"nothing was deleted: {roots.problems[0]}"
            _log.warning(
                "cache.collection.blocked", project_id=self.project_id, cause=roots.problems[0]
            )
        return bool(roots.problems)

    async def retire(self, roots: Iterable[Root]) -> None:
        """Remove contributions, whose blobs then stay for the grace, and cache mounts.

        A mount whose document is gone is a mount that was never stored: it needs no more care.

        Raises:
            InterruptedCollectionError: this node may not go on.
            CacheUnavailableError: the store does not answer.
        """
        for root in roots:
            if not self.terms.allowed():
                raise InterruptedCollectionError
            if root.is_mount:
                await self.objects.delete(mount_key(self.project_id, root.scope, root.name))
                self.report.removed_entries += 1
                _log.info("cache.mount.removed", project_id=self.project_id, scope=root.scope)
                continue
            await retire_contribution(
                self.objects, self.project_id, root.scope, root.name, clock=self.terms.clock
            )
            self.report.removed_entries += 1
            _log.info(
                "cache.contribution.removed",
                project_id=self.project_id,
                scope=root.scope,
                contribution=root.name,
            )

    async def retire_images(self, images: list[Root]) -> None:
        """Remove images, whose blobs then stay for the grace.

        Raises:
            InterruptedCollectionError: this node may not go on.
            CacheUnavailableError: the store does not answer.
        """
        await self._delete_condemned(SweepPlan(), [], images)

    async def _sweep(self, plan: SweepPlan, images: list[Root]) -> None:
        blobs = iter(plan.blobs)
        part = list(islice(blobs, MAX_CONDEMNED))
        while part or images or plan.removed:
            await self._delete_condemned(plan, part, images)
            images = []
            plan.removed = {}
            part = list(islice(blobs, MAX_CONDEMNED))

    async def _delete_condemned(
        self, plan: SweepPlan, blobs: list[str], images: list[Root]
    ) -> None:
        document = CondemnedDocument(
            self.terms.owner,
            CONDEMNED_SECONDS,
            frozenset(blobs),
            frozenset(root.name for root in images),
        )
        async with CondemnedList(
            self.objects, self.project_id, document, self.terms.clock
        ) as condemned:
            snapshot, roots = await self.reader.read_again(self.project_id)
            if self._blocked(roots):
                return
            marked = roots.marks(self.terms.now.now(), self.terms.grace)
            going = [digest for digest in blobs if digest not in marked]
            deleted = await self._delete(
                (blob_key(self.project_id, digest) for digest in going), condemned
            )
            leased = roots.leased_digests(self.terms.now.now())
            for root in images:
                info = snapshot.images.get(root.name)
                pushed_again = info is not None and info.modified_at != root.written_at
                if not pushed_again and root.name not in leased:
                    await self._retire_image(root.name, condemned)
            # Who leases one of these listed it before its grace was over, so the lease is here.
            held = roots.leased_contributions(self.terms.now.now())
            await self._delete(key for name, key in plan.removed.items() if name not in held)
        freed = sum(plan.blobs[digest] for digest in going)
        self.report.deleted_blobs += deleted
        self.report.deleted_bytes += freed
        self.report.garbage_bytes -= freed

    async def _retire_image(self, digest: str, condemned: CondemnedList) -> None:
        if not (self.terms.allowed() and await condemned.may_delete()):
            raise InterruptedCollectionError
        await retire_image(
            self.objects, self.project_id, digest, condemned.may_delete, clock=self.terms.clock
        )
        self.report.removed_entries += 1
        _log.info("cache.image.removed", project_id=self.project_id, digest=digest)

    async def _delete(self, keys: Iterable[str], condemned: CondemnedList | None = None) -> int:
        async def allowed() -> bool:
            if not self.terms.allowed():
                return False
            return condemned is None or await condemned.may_delete()

        wanted = list(keys)
        deleted = await delete_each(self.objects, wanted, allowed, parallel=self.terms.parallel)
        if deleted < len(wanted):
            raise InterruptedCollectionError
        return deleted

    async def _sweep_packs(self, snapshot: ProjectSnapshot) -> None:
        indexes, packs, marks = (
            valid_packs(self.project_id, kind, snapshot.context[kind])
            for kind in ("index", "packs", "used")
        )
        plan = plan_pack_sweep(
            indexes,
            packs,
            marks,
            now=self.terms.now.now(),
            keep_bytes=self.limits.context_keep_bytes,
            keep_seconds=self.limits.context_idle_seconds,
        )
        if not self.terms.allowed():
            raise InterruptedCollectionError
        await delete_packs(self.objects, self.project_id, plan, indexes, packs, marks)
        self.report.deleted_packs = len(plan.packs)
