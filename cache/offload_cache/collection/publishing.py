"""What an upload does so that no collection deletes the blobs that its document will name.

First the lease, then the lists of condemned blobs, then the look whether a blob is there. Whoever
turns this order round relies on blobs that are about to go.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING

from offload_cache.collection.condemned import is_condemned
from offload_cache.collection.leases import Lease
from offload_cache.collection.timing import UPLOAD_TRUST_SECONDS
from offload_cache.keys import blob_key
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore

_MAX_SIGHTINGS = 200_000


class CondemnedError(Exception):
    """A collection is about to delete a blob; it may be looked for when that is over."""


class BlobFound(Enum):
    """How a blob came to be in the store."""

    KNOWN = "known"
    """It was seen or uploaded lately enough; nobody was asked."""
    SEEN = "seen"
    """It was there."""
    WRITTEN = "written"
    """It was uploaded."""


class Sightings:
    """When this process last saw or wrote blobs of the shared store. Times are `clock`'s."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, str], float] = {}
        self._written: dict[tuple[str, str], float] = {}

    def note(self, project_id: str, digest: str, started: float, *, written: bool) -> None:
        """Note that a request sent at `started` found or wrote a blob."""
        table = self._written if written else self._seen
        table.pop((project_id, digest), None)
        table[project_id, digest] = started
        if len(table) > _MAX_SIGHTINGS:
            del table[next(iter(table))]

    def forget(self, project_id: str, digest: str) -> None:
        """Count a blob as never seen: a read has failed."""
        self._seen.pop((project_id, digest), None)
        self._written.pop((project_id, digest), None)

    def vouch(self, project_id: str, digest: str, since: float) -> bool:
        """Whether a blob is there for someone whose lease counts since `since`."""
        name = (project_id, digest)
        if self._seen.get(name, float("-inf")) >= since:
            return True
        written = self._written.get(name, float("-inf"))
        # A young blob is not condemned: that it was written before the lease does no harm.
        return written >= since or self._clock() - written < UPLOAD_TRUST_SECONDS


class Publishing:
    """The protection of one publication, from its first blob until its document is written."""

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        digests: Iterable[str],
        sightings: Sightings,
        *,
        holder: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._project_id = project_id
        self._digests = frozenset(digests)
        self._sightings = sightings
        self._clock = clock
        self._lease = Lease(objects, project_id, holder, clock=clock)
        self._since: float | None = None
        self._lock = asyncio.Lock()
        self.turn = 0
        """Counts the beginnings: what was checked in another turn is void."""

    @property
    def holds(self) -> bool:
        """Whether the checks made since `protect` last said False still count."""
        return self._since is not None and self._lease.holds

    async def protect(self) -> bool:
        """Take or renew the lease; call it before each blob and each document.

        Returns:
            False when protection begins only now: every blob must be ensured from the first.

        Raises:
            CondemnedError: try again later.
            CacheUnavailableError: the store does not answer.
        """
        async with self._lock:
            return await self._protect()

    async def _protect(self) -> bool:
        unbroken = await self._lease.renew(self._digests)
        if unbroken and self._since is not None:
            return True
        self._since = None
        if await is_condemned(self._objects, self._project_id, self._digests, self._leased_at):
            raise CondemnedError("a collection is about to delete blobs of this publication")
        self._since = self._clock()
        self.turn += 1
        return False

    async def _leased_at(self) -> datetime:
        info = await self._objects.stat(self._lease.key)
        return datetime.min.replace(tzinfo=UTC) if info is None else info.modified_at

    async def ensure(
        self, digest: str, size_bytes: int | None, find: Callable[[str], Path | None]
    ) -> BlobFound:
        """See to it that a blob is in the store; `protect` comes before.

        Args:
            digest: of the blob.
            size_bytes: what it must have; None when that is not known.
            find: returns its file, None when it is not on this node's disk.

        Raises:
            NotFoundError: it is neither in the store nor on the disk.
            CacheUnavailableError: the store does not answer.
        """
        if self._since is None:
            raise RuntimeError("a blob was to be ensured without protection")
        if self._sightings.vouch(self._project_id, digest, self._since):
            return BlobFound.KNOWN
        key = blob_key(self._project_id, digest)
        started = self._clock()
        found = await self._objects.stat(key)
        if found is not None and size_bytes in (None, found.size_bytes):
            self._sightings.note(self._project_id, digest, started, written=False)
            return BlobFound.SEEN
        return await self.write(digest, find)

    async def write(self, digest: str, find: Callable[[str], Path | None]) -> BlobFound:
        """Upload a blob without asking whether it is there.

        Raises:
            NotFoundError: it is not on the disk.
            CacheUnavailableError: the store does not answer.
        """
        path = find(digest)
        if path is None:
            raise NotFoundError(f"blob {digest} is no longer on this node")
        started = self._clock()
        await self._objects.write_file(blob_key(self._project_id, digest), path)
        if self.holds:
            # Otherwise a collection that knew the blob as old may delete the new one.
            self._sightings.note(self._project_id, digest, started, written=True)
        return BlobFound.WRITTEN

    async def end(self) -> None:
        """Give the lease up: the document is written, or will never be.

        Raises:
            CacheUnavailableError: the store does not answer; the lease runs out by itself.
        """
        self._since = None
        await self._lease.end()
