"""The blobs of one project: on this node's disk, else in the store that all nodes share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.blobwriter import BlobWriter
from offload_cache.diskstore import TRIM_TARGET
from offload_cache.keys import blob_key, check_project_id
from offload_cache.presence import BlobState
from offload_cache.statistics import CacheStatistics
from offload_cache.uploadtable import UploadItem
from offload_core.aio import TaskSet, for_each
from offload_core.errors import (
    CacheUnavailableError,
    DigestMismatchError,
    NotFoundError,
    QuotaExceededError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import AbstractContextManager
    from pathlib import Path

    from offload_cache.diskstore import DiskStore, Ingest
    from offload_cache.objectstore import ObjectStore
    from offload_cache.presence import Presence
    from offload_cache.uploads import UploadQueue

_log = structlog.get_logger(__name__)

_STAT_SECONDS = 2.0
_RANGE_BYTES = 16 << 20
_PARALLEL_RANGES = 4
_DEFAULT_MAX_AGE_SECONDS = 3600.0


class ProjectStore:
    """One project's blobs in both tiers. An async context manager; it does not own its tiers.

    Nobody sees a byte of a blob before its size and digest were verified on disk. Everything that
    goes wrong with the shared store is a miss here: builds go on without it.
    """

    def __init__(
        self,
        project_id: str,
        disk: DiskStore,
        presence: Presence,
        *,
        objects: ObjectStore | None = None,
        uploads: UploadQueue | None = None,
        executor: ThreadPoolExecutor,
        statistics: CacheStatistics | None = None,
    ) -> None:
        self.project_id = check_project_id(project_id)
        self.disk = disk
        self.presence = presence
        self.objects = objects
        self.uploads = uploads
        self.statistics = statistics or CacheStatistics()
        self._executor = executor
        self._flights: dict[str, asyncio.Task[Path]] = {}
        self._tasks = TaskSet(on_error=self._crashed)
        self._trimming = False

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(self._executor, self.disk.open)
        await self.presence.load()
        if suspects := self.disk.suspects():
            # Until then none of them is offered to a build.
            self._tasks.start(self.settle(suspects), name="check blobs after a reboot")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        # A miss is no event, and the waiters of a flight get its error themselves.
        if not isinstance(error, NotFoundError):
            _log.warning("blob.task.failed", task=name, error=repr(error))

    # -- reading

    async def open_blob(self, digest: str) -> Path:
        """Return the path of a whole, verified blob, fetching it from the shared store if need be.

        Several callers share one fetch. It goes on when one of them is cancelled.

        Raises:
            NotFoundError: neither tier has it, or the shared store is away, slow or holds a
                corrupt object.
        """
        path = await self._local(digest)
        if path is not None:
            return path
        flight = self._flights.get(digest)
        if flight is None:
            flight = self._tasks.start(self._fetch(digest), name=f"fetch {digest}")
            self._flights[digest] = flight
            flight.add_done_callback(lambda _: self._flights.pop(digest, None))
        try:
            return await asyncio.shield(flight)
        except asyncio.CancelledError:
            if flight.cancelled():  # the store is closing, not our caller
                raise NotFoundError(f"blob {digest} was not fetched: the node stops") from None
            raise

    async def _local(self, digest: str) -> Path | None:
        await self.settle([digest])
        return self.disk.find(digest)

    async def settle(self, digests: Iterable[str]) -> None:
        """Hash blobs that a power loss may have damaged, so that nothing on the loop has to."""
        loop = asyncio.get_running_loop()
        for digest in digests:
            if self.disk.is_suspect(digest):
                await loop.run_in_executor(self._executor, self.disk.find, digest)

    async def _fetch(self, digest: str) -> Path:
        objects = self.objects
        known = self.presence.get(digest)
        if objects is None or (known is not None and known.state is not BlobState.PRESENT):
            raise NotFoundError(f"blob {digest} is not in the cache")
        try:
            size_bytes = known.size_bytes if known is not None else 0
            if not size_bytes:
                info = await objects.stat(blob_key(self.project_id, digest))
                if info is None:
                    state = BlobState.ABSENT if known is None else BlobState.LOST
                    await self.presence.note(digest, state)
                    raise NotFoundError(f"blob {digest} is not in the cache")
                size_bytes = info.size_bytes
            return await self._download(objects, digest, size_bytes)
        except CacheUnavailableError as error:
            await self.presence.note(digest, BlobState.UNREACHABLE)
            # The store's health says it once for all blobs.
            _log.debug("blob.fetch.failed", digest=digest, cause=error.message)
            raise NotFoundError(f"blob {digest} is out of reach: {error.message}") from error
        except DigestMismatchError as error:
            self.statistics.corrupt_objects += 1
            await self.presence.note(digest, BlobState.LOST)
            _log.warning("blob.corrupt", digest=digest, cause=error.message)
            raise NotFoundError(f"blob {digest} is corrupt in the shared cache") from error
        except QuotaExceededError as error:
            self._start_trim()
            _log.warning("blob.fetch.failed", digest=digest, cause=error.message)
            raise NotFoundError(f"blob {digest} does not fit: {error.message}") from error

    async def _download(self, objects: ObjectStore, digest: str, size_bytes: int) -> Path:
        key = blob_key(self.project_id, digest)
        loop = asyncio.get_running_loop()
        ingest = self.disk.ingest()
        try:
            if size_bytes <= _RANGE_BYTES:
                await objects.read(key, ingest.write)
            else:
                await self._download_ranges(objects, key, ingest, size_bytes)
            await loop.run_in_executor(self._executor, ingest.commit, digest, size_bytes)
        except NotFoundError:
            await self.presence.note(digest, BlobState.LOST)
            raise
        finally:
            ingest.abort()
        await self.presence.note(digest, BlobState.PRESENT, size_bytes)
        self._trim_if_needed()
        path = self.disk.find(digest)
        if path is None:
            raise NotFoundError(f"blob {digest} was trimmed while it was fetched")
        return path

    @staticmethod
    async def _download_ranges(
        objects: ObjectStore, key: str, ingest: Ingest, size_bytes: int
    ) -> None:
        """Fetch a large object in parallel ranges: one S3 connection rarely fills the line."""

        async def fetch(offset: int) -> None:
            position = offset

            def write(piece: bytes) -> None:
                nonlocal position
                ingest.write_at(position, piece)
                position += len(piece)

            length = min(_RANGE_BYTES, size_bytes - offset)
            await objects.read(key, write, offset=offset, length=length)

        await for_each(range(0, size_bytes, _RANGE_BYTES), fetch, parallel=_PARALLEL_RANGES)

    async def stat_blob(
        self, digest: str, *, max_age_seconds: float = _DEFAULT_MAX_AGE_SECONDS
    ) -> int | None:
        """Return the bytes of a blob in either tier, None when it is in none or cannot be asked.

        What the shared store said is remembered: "yes" for `max_age_seconds`, "no" for seconds.
        """
        path = await self._local(digest)
        if path is not None:
            size_bytes = self.disk.size(digest)
            if size_bytes is not None:
                return size_bytes
        if self.objects is None:
            return None
        known = self.presence.get(digest)
        if known is not None and known.state is not BlobState.PRESENT:
            return None
        known = self.presence.get(digest, max_age_seconds=max_age_seconds)
        if known is not None and known.size_bytes:
            return known.size_bytes
        try:
            info = await self.objects.stat(blob_key(self.project_id, digest), timeout=_STAT_SECONDS)
        except CacheUnavailableError:
            return None
        if info is None:
            await self.presence.note(digest, BlobState.ABSENT)
            return None
        await self.presence.note(digest, BlobState.PRESENT, info.size_bytes)
        return info.size_bytes

    def is_offerable(self, digest: str) -> bool:
        """Whether a blob is here or known to be in a shared store that answers; asks nobody."""
        if self.disk.has(digest):
            return True
        return (
            self.objects is not None and self.objects.reachable and self.presence.is_present(digest)
        )

    async def read_blob(self, digest: str, *, max_bytes: int) -> bytes:
        """Return a small blob, such as a manifest or a configuration.

        Raises:
            NotFoundError: no tier has it, or it is larger than `max_bytes`.
        """
        path = await self.open_blob(digest)
        try:
            if path.stat().st_size > max_bytes:
                raise NotFoundError(f"blob {digest} has more than {max_bytes} bytes")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"blob {digest} was trimmed") from error

    # -- writing

    def ingest(self) -> BlobWriter:
        """Start a blob on disk.

        Raises:
            QuotaExceededError: the disk is full.
        """
        return BlobWriter(self.disk.ingest(), self._executor, self._trim_if_needed)

    async def put_blob(self, data: bytes, digest: str | None = None) -> str:
        """Store a small blob on disk and return its digest.

        Raises:
            DigestMismatchError: `data` is not what `digest` names.
            QuotaExceededError: the disk is full.
        """
        loop = asyncio.get_running_loop()
        stored = await loop.run_in_executor(self._executor, self.disk.put, data, digest)
        self._trim_if_needed()
        return stored

    async def publish(self, name: str, stages: Sequence[Sequence[str | UploadItem]]) -> int | None:
        """Queue blobs and documents for the shared store, stage after stage.

        Blobs that are not on disk must be in the shared store already; when one is not, the
        publication is given up. So are old ones when blobs that wait, and thus cannot be
        trimmed, take all of the disk's bound.

        Returns:
            The number to wait for with `UploadQueue.wait_published`, None without a shared store.
        """
        if self.uploads is None:
            return None
        items: list[UploadItem] = []
        for stage, members in enumerate(stages):
            for member in members:
                if isinstance(member, UploadItem):
                    items.append(member)
                else:
                    await self.settle([member])
                    size_bytes = self.disk.size(member)
                    items.append(UploadItem.for_blob(self.project_id, stage, member, size_bytes))
        bound = self.disk.max_bytes
        return await self.uploads.publish(
            name,
            self.project_id,
            items,
            max_bytes=None if bound is None else int(bound * TRIM_TARGET),
        )

    # -- keeping the disk within its bound

    def lease(self, digests: Iterable[str]) -> AbstractContextManager[None]:
        """Keep blobs on disk while the returned context is open."""
        return self.disk.lease(digests)

    def set_max_bytes(self, max_bytes: int | None) -> None:
        """Change the bound of the disk; what is above it is removed soon."""
        self.disk.max_bytes = max_bytes
        self._trim_if_needed()

    def _trim_if_needed(self) -> None:
        if self.disk.over_limit:
            self._start_trim()

    def _start_trim(self) -> None:
        if not self._trimming:
            self._trimming = True
            self._tasks.start(self.trim(), name="trim")

    async def trim(self) -> None:
        """Bring the disk below its bound; blobs that wait for their upload stay."""
        try:
            keep: set[str] = set()
            if self.uploads is not None:
                keep = await self.uploads.pending_digests(self.project_id)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, self.disk.trim, keep)
        finally:
            self._trimming = False
