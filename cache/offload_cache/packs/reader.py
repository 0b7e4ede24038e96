"""Reads blobs out of packs: few large ranges, a few at a time, every blob verified."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_cache.keys import pack_key
from offload_cache.packs.catalog import blob_key
from offload_cache.packs.layout import DamagedPackError, unpack_frame
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from offload_cache.objectstore import ObjectStore
    from offload_cache.packs.catalog import FramePlace, PackCatalog

_log = structlog.get_logger(__name__)

_RANGE_BYTES = 4 << 20
_GAP_BYTES = 128 << 10
"""Bytes that nobody asked for are read when they are fewer than these between two wanted frames:
a request costs about as much as their transfer."""
_PARALLEL_RANGES = 4
_REQUEST_SECONDS = 10.0
_SLOWEST_BYTES_PER_SECOND = 256 << 10
"""A store that is slower is no help: most clients send as fast."""
STALL_SECONDS = 5.0
"""Longest wait without any byte; then the client is asked instead."""
SHY_SECONDS = 60.0
"""After a stall nothing is asked of the store for so long."""
_TICK_SECONDS = 0.5
_GROUPS_AHEAD = 2

Group = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Range:
    """Neighbouring frames of one pack that are read with one request."""

    pack: str
    frames: list[FramePlace]

    @property
    def start(self) -> int:
        return self.frames[0].position

    @property
    def end(self) -> int:
        return self.frames[-1].position + self.frames[-1].stored_bytes


class _Flow:
    """What has been read and not yet been taken."""

    def __init__(self) -> None:
        self.groups: asyncio.Queue[Group | None] = asyncio.Queue(_GROUPS_AHEAD)
        self.heard_at = 0.0
        self.stalled = False
        self._room = asyncio.Semaphore(_PARALLEL_RANGES)
        self._entering = asyncio.Lock()

    @asynccontextmanager
    async def room(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait until so much may be read; one large frame takes the room of several ranges."""
        shares = min(_PARALLEL_RANGES, -(-size_bytes // _RANGE_BYTES))
        taken = 0
        try:
            async with self._entering:  # two that take a part each would wait for each other
                while taken < shares:
                    await self._room.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._room.release()

    async def next_group(self) -> Group | None:
        """Return the next group; None at the end, or when nothing comes any more."""
        waiting_since = time.monotonic()  # while the taker was busy, readers may have had to wait
        while True:
            try:
                async with asyncio.timeout(_TICK_SECONDS):
                    return await self.groups.get()
            except TimeoutError:
                heard_at = max(self.heard_at, waiting_since)
                if time.monotonic() - heard_at > STALL_SECONDS:
                    self.stalled = True
                    return None


def join_frames(places: Sequence[FramePlace]) -> Iterator[_Range]:
    """Yield what to read for frames that are in order of packs and positions."""
    current: _Range | None = None
    for place in places:
        end = place.position + place.stored_bytes
        if (
            current is not None
            and current.pack == place.pack
            and place.position - current.end <= _GAP_BYTES
            and end - current.start <= _RANGE_BYTES
        ):
            current.frames.append(place)
            continue
        if current is not None:
            yield current
        current = _Range(place.pack, [place])
    if current is not None:
        yield current


class PackReader:
    """Reads from one project's packs."""

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        catalog: PackCatalog,
        threads: Executor,
        *,
        on_read: Callable[[str], None],
    ) -> None:
        self._objects = objects
        self._project_id = project_id
        self._catalog = catalog
        self._threads = threads
        self._on_read = on_read
        self._stalled_at = -SHY_SECONDS

    @property
    def shy(self) -> bool:
        """Whether the store has let a reader wait a moment ago."""
        return time.monotonic() < self._stalled_at + SHY_SECONDS

    async def read(self, places: Sequence[FramePlace]) -> AsyncGenerator[Group]:
        """Yield the wanted blobs of frames, a frame's at a time, in any order.

        What cannot be read, or is not what its digest says, is left out. Ends early when nothing
        has come for `STALL_SECONDS`. Memory: ranges of 16 MiB together, as much unpacked, and two
        groups.
        """
        flow = _Flow()
        ranges = join_frames(places)
        tasks = TaskSet(on_error=self._crashed)
        workers = [
            tasks.start(self._read_some(ranges, flow), name="context-pack-read")
            for _ in range(_PARALLEL_RANGES)
        ]
        tasks.start(_end_after(workers, flow), name="context-pack-end")
        try:
            while (group := await flow.next_group()) is not None:
                yield group
            if flow.stalled:
                self._stalled_at = time.monotonic()
                _log.warning("context.fetch.stalled", project_id=self._project_id)
        finally:
            await tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("context.fetch.crashed", task=name, error=repr(error))

    async def _read_some(self, ranges: Iterator[_Range], flow: _Flow) -> None:
        for item in ranges:
            if not self._objects.reachable:
                return
            try:
                async with (
                    flow.room(item.end - item.start),
                    aclosing(self._read_range(item, flow)) as found,
                ):
                    async for group in found:
                        await flow.groups.put(group)
            except CacheUnavailableError as error:
                _log.info("context.fetch.failed", pack=item.pack, cause=error.message)
            except (NotFoundError, DamagedPackError) as error:
                await self._reject(item.pack, str(error))

    async def _reject(self, pack: str, cause: str) -> None:
        _log.warning("context.pack.damaged", project_id=self._project_id, pack=pack, cause=cause)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._catalog.reject, pack)

    async def _read_range(self, item: _Range, flow: _Flow) -> AsyncGenerator[Group]:
        length = item.end - item.start
        data = bytearray()

        def take(piece: bytes) -> None:
            data.extend(piece)
            flow.heard_at = time.monotonic()

        await self._objects.read(
            pack_key(self._project_id, "packs", item.pack),
            take,
            offset=item.start,
            length=length,
            timeout=_REQUEST_SECONDS + length / _SLOWEST_BYTES_PER_SECOND,
        )
        if len(data) != length:
            raise DamagedPackError("the pack is shorter than its index says")
        self._on_read(item.pack)
        loop = asyncio.get_running_loop()
        stored = memoryview(data)
        for frame in item.frames:
            at = frame.position - item.start
            part = stored[at : at + frame.stored_bytes]
            yield await loop.run_in_executor(self._threads, _unpack, part, frame)


def _unpack(stored: memoryview, frame: FramePlace) -> Group:
    plain = unpack_frame(stored, frame.size_bytes, raw=frame.raw)
    found: Group = []
    for blob in frame.blobs:
        content = bytes(plain[blob.position : blob.position + blob.size_bytes])
        actual = hashlib.sha256(content).digest()
        if actual == blob.digest:
            found.append((blob.digest, content))
        elif blob_key(actual) != blob_key(blob.digest):
            raise DamagedPackError("a blob is not what its digest says")
        # Otherwise it is another blob whose digest begins alike.
    return found


async def _end_after(workers: Sequence[asyncio.Task[None]], flow: _Flow) -> None:
    await asyncio.wait(workers)
    await flow.groups.put(None)
