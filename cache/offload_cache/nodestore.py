"""All of a node's cache: its index, the shared store, the upload queue, every project's blobs."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from offload_cache.collection.readlease import ReadLease
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
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore
    from offload_cache.unify import Limits

T = TypeVar("T")

_IO_THREADS = 4


@dataclass(frozen=True, slots=True)
class ProjectCache:
    """One project's part of the node's cache.

    Attributes:
        store: blobs.
        scopes: what builds added.
        offers: what builds may import.
        read_lease: keeps in the shared store what running builds read; None without one.
    """

    store: ProjectStore
    scopes: ScopeIndex
    offers: OfferDesk
    read_lease: ReadLease | None = None


class NodeStore:
    """Opens and owns everything below one data directory; an async context manager.

    Layout: `index.db` and `projects/<project>/` with the project's disk store.

    Args:
        data_dir: the node's directory for the cache; created when missing.
        objects: the shared store, None for a node on its own. It is closed with the node's store.
        max_project_bytes: bound of each project's disk store, None for no bound.
        upload_workers: parallel transfers to the shared store.
        statistics: counters to use; give the shared store the same ones.
        import_limits: bounds of what a build is given to import.
        holder: name of the node, for people who look at leases.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        objects: ObjectStore | None = None,
        max_project_bytes: int | None = None,
        upload_workers: int = 4,
        statistics: CacheStatistics | None = None,
        import_limits: Limits | None = None,
        holder: str = "node",
    ) -> None:
        self._holder = holder
        self.read_lease: ReadLease | None = None
        self.statistics = statistics or CacheStatistics()
        self.objects = objects
        self.uploads: UploadQueue | None = None
        self._data_dir = data_dir
        self._max_project_bytes = max_project_bytes
        self._upload_workers = upload_workers
        self._import_limits = import_limits
        self._database = CacheDatabase(data_dir / "index.db")
        self._executor = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="blob-io")
        # One is enough: the work is Python's, and parallel threads would only share its lock.
        self._unify_thread = ThreadPoolExecutor(1, thread_name_prefix="cache-unify")
        self._stack = AsyncExitStack()
        self._opening: dict[str, asyncio.Lock] = {}
        self._bounds: dict[str, int] = {}
        self._projects: dict[str, ProjectCache] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self._executor.shutdown, wait=True)
            stack.callback(self._unify_thread.shutdown, wait=True)
            if self.objects is not None:
                stack.push_async_callback(self.objects.close)
            await stack.enter_async_context(self._database)
            if self.objects is not None:
                self.read_lease = await stack.enter_async_context(
                    ReadLease(self.objects, self._holder)
                )
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

    @property
    def database(self) -> CacheDatabase:
        """The node's index; it is open as long as this store is."""
        return self._database

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
                DiskStore(self._root(project_id), max_bytes=self.max_bytes(project_id)),
                Presence(self._database, project_id),
                objects=self.objects,
                uploads=self.uploads,
                executor=self._executor,
                statistics=self.statistics,
            )
        )
        scopes = await self._stack.enter_async_context(
            ScopeIndex(self._database, store, self._unify_thread)
        )
        offers = await self._stack.enter_async_context(
            OfferDesk(store, scopes, self._unify_thread, self._import_limits)
        )
        return ProjectCache(store, scopes, offers, self.read_lease)

    def _root(self, project_id: str) -> Path:
        return self._data_dir / "projects" / project_id

    def max_bytes(self, project_id: str) -> int | None:
        """Return the bound of a project's blobs on this disk, None for none."""
        return self._bounds.get(project_id, self._max_project_bytes)

    def set_bounds(self, bounds: Mapping[str, int]) -> None:
        """Give projects bounds of their own; those that are not named have the common one.

        Projects that are open are trimmed soon; `NodeBounds` sees to the others.
        """
        self._bounds = dict(bounds)
        for project_id, cache in self._projects.items():
            cache.store.set_max_bytes(self.max_bytes(project_id))

    def opened(self) -> Mapping[str, ProjectCache]:
        """Return the projects that are open."""
        return self._projects

    def on_disk(self) -> list[str]:
        """Return the projects that have a folder on this disk, open or not."""
        folder = self._data_dir / "projects"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    @asynccontextmanager
    async def hold(self, project_id: str) -> AsyncIterator[DiskStore]:
        """Give the blobs of a project for a moment, without opening it for that.

        A project that is not open cannot be opened meanwhile.

        Raises:
            UsageError: `project_id` is no project id.
        """
        check_project_id(project_id)
        async with self._opening.setdefault(project_id, asyncio.Lock()):
            cache = self._projects.get(project_id)
            yield DiskStore(self._root(project_id)) if cache is None else cache.store.disk

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do blocking work on blobs in one of the store's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _project_uploads(self, project_id: str) -> ProjectUploads:
        cache = await self.project(project_id)
        store = cache.store
        return ProjectUploads(store.disk.find, store.settle, store.presence)

    @property
    def shared_state(self) -> str:
        """One sentence for people about the shared cache; empty when there is none."""
        return "" if self.objects is None else self.objects.state

    @property
    def shared_problem(self) -> str:
        """Why the shared cache is away, for people; empty when it is not, or there is none."""
        reachable = self.objects is None or self.objects.reachable
        return "" if reachable else self.shared_state
