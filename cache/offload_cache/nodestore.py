"""All of a node's cache: its index, the shared store, the upload queue, every project's blobs."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from offload_cache.database import CacheDatabase
from offload_cache.diskstore import DiskStore
from offload_cache.keys import check_project_id
from offload_cache.offers import OfferDesk
from offload_cache.presence import Presence
from offload_cache.scopes import ScopeIndex
from offload_cache.statistics import CacheStatistics
from offload_cache.tiered import ProjectStore
from offload_cache.uploads import ProjectUploads, UploadQueue

if TYPE_CHECKING:
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore

_IO_THREADS = 4


@dataclass(frozen=True, slots=True)
class ProjectCache:
    """One project's part of the node's cache."""

    store: ProjectStore
    scopes: ScopeIndex
    offers: OfferDesk


class NodeStore:
    """Opens and owns everything below one data directory; an async context manager.

    Layout: `index.db` and `projects/<project>/` with the project's disk store.

    Args:
        data_dir: the node's directory for the cache; created when missing.
        objects: the shared store, None for a node on its own. It is closed with the node's store.
        max_project_bytes: bound of each project's disk store, None for no bound.
        upload_workers: parallel transfers to the shared store.
        statistics: counters to use; give the shared store the same ones.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        objects: ObjectStore | None = None,
        max_project_bytes: int | None = None,
        upload_workers: int = 4,
        statistics: CacheStatistics | None = None,
    ) -> None:
        self.statistics = statistics or CacheStatistics()
        self.objects = objects
        self.uploads: UploadQueue | None = None
        self._data_dir = data_dir
        self._max_project_bytes = max_project_bytes
        self._upload_workers = upload_workers
        self._database = CacheDatabase(data_dir / "index.db")
        self._executor = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="blob-io")
        self._stack = AsyncExitStack()
        self._opening: dict[str, asyncio.Lock] = {}
        self._projects: dict[str, ProjectCache] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self._executor.shutdown, wait=True)
            if self.objects is not None:
                stack.push_async_callback(self.objects.close)
            await stack.enter_async_context(self._database)
            if self.objects is not None:
                self.uploads = await stack.enter_async_context(
                    UploadQueue(
                        self._database,
                        self.objects,
                        self._project_uploads,
                        workers=self._upload_workers,
                        statistics=self.statistics,
                    )
                )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def project(self, project_id: str) -> ProjectCache:
        """Return a project's cache, opened at its first use.

        Raises:
            UsageError: `project_id` is no project id.
        """
        check_project_id(project_id)
        async with self._opening.setdefault(project_id, asyncio.Lock()):
            if project_id not in self._projects:
                self._projects[project_id] = await self._open(project_id)
            return self._projects[project_id]

    async def _open(self, project_id: str) -> ProjectCache:
        store = await self._stack.enter_async_context(
            ProjectStore(
                project_id,
                DiskStore(
                    self._data_dir / "projects" / project_id, max_bytes=self._max_project_bytes
                ),
                Presence(self._database, project_id),
                objects=self.objects,
                uploads=self.uploads,
                executor=self._executor,
                statistics=self.statistics,
            )
        )
        scopes = ScopeIndex(self._database, store)
        return ProjectCache(store, scopes, OfferDesk(store, scopes))

    async def _project_uploads(self, project_id: str) -> ProjectUploads:
        cache = await self.project(project_id)
        return ProjectUploads(cache.store.disk.find, cache.store.presence)

    @property
    def shared_state(self) -> str:
        """One sentence for people about the shared cache; empty when there is none."""
        return "" if self.objects is None else self.objects.state

    @property
    def shared_problem(self) -> str:
        """Why the shared cache is away, for people; empty when it is not, or there is none."""
        reachable = self.objects is None or self.objects.reachable
        return "" if reachable else self.shared_state
