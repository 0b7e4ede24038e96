"""Logs of builds: taken in from nodes, kept in the store, replayed and followed.

Writes are committed in groups: batches stay in memory for up to `COMMIT_SECONDS`, readers see them
there at once. A crash of the gateway loses no more than that; nodes send their journals again
from the start when they reconnect, and what is already here is dropped by its number.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog
import zstandard

from offload_builder.gateway import schema
from offload_builder.gateway.pulse import Pulse
from offload_core.errors import GatewayUnreachableError, InternalError
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import events_pb2 as events_pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

COMMIT_SECONDS = 0.5
COMMIT_BYTES = 1 << 20
"""Batches of one build are committed early when they have so many bytes; also about the size of
one row and one message."""

MAX_PENDING_BYTES = 64 << 20
"""Above this, nodes are made to wait."""

QUIET_SECONDS = 0.3
"""How long after the end of a build followers wait for output that overtook the news."""

_ZSTD_LEVEL = 3
_ROWS_PER_READ = 8
_REMEMBERED_TAILS = 1000


@dataclass
class _Tail:
    """The end of one build's log."""

    last_sequence: int
    size_bytes: int
    """Of everything so far, before compression."""
    pending: list[events_pb.ProgressBatch] = field(default_factory=list)
    pending_bytes: int = 0
    committing: list[events_pb.ProgressBatch] = field(default_factory=list)
    changed: Pulse = field(default_factory=Pulse)
    readers: int = 0


class LogBook:
    """The logs of all builds. Belongs to the event loop; `run` commits."""

    def __init__(self, store: Store, max_bytes_per_build: int) -> None:
        """Use a store; output of a build beyond the limit is left out, its steps are not."""
        self._store = store
        self._max_bytes = max_bytes_per_build
        self._tails: OrderedDict[str, _Tail] = OrderedDict()
        self._opening = asyncio.Lock()
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._pending_bytes = 0
        self._room = Pulse()
        self._stopping = False
        self._writing: asyncio.Future[int] | None = None

    async def append(self, build_id: str, batches: Iterable[events_pb.ProgressBatch]) -> None:
        """Take in output; what is already here is dropped.

        Waits while too much is pending, which slows the node down.
        """
        while self._pending_bytes > MAX_PENDING_BYTES:
            await self._room.wait()
        tail = await self._tail(build_id)
        for batch in batches:
            if batch.sequence <= tail.last_sequence:
                continue
            self._limit(tail, batch)
            size = batch.ByteSize()
            tail.last_sequence = batch.sequence
            tail.size_bytes += size
            tail.pending.append(batch)
            tail.pending_bytes += size
            self._pending_bytes += size
        if tail.pending:
            self._dirty.add(build_id)
            self._wake.set()
            if tail.pending_bytes >= COMMIT_BYTES:
                self._urgent.set()
            tail.changed.fire()

    def _limit(self, tail: _Tail, batch: events_pb.ProgressBatch) -> None:
        if tail.size_bytes <= self._max_bytes:
            if tail.size_bytes + batch.ByteSize() <= self._max_bytes:
                return
            # Once, at the place where the gap begins.
            batch.warnings.add(
                level=1,
                short=f"the history keeps {self._max_bytes} bytes of output per build; "
                "what follows is left out".encode(),
            )
            tail.size_bytes = self._max_bytes + 1
        del batch.logs[:]
        del batch.statuses[:]

    async def _tail(self, build_id: str) -> _Tail:
        tail = self._tails.get(build_id)
        if tail is None:
            async with self._opening:
                tail = self._tails.get(build_id)
                if tail is None:
                    tail = await self._load_tail(build_id)
                    self._tails[build_id] = tail
                    self._forget_old_tails()
        self._tails.move_to_end(build_id)
        return tail

    async def _load_tail(self, build_id: str) -> _Tail:
        table = schema.build_logs
        query = sa.select(
            sa.func.coalesce(sa.func.max(table.c.last_sequence), 0),
            sa.func.coalesce(sa.func.sum(table.c.size_bytes), 0),
        ).where(table.c.build_id == build_id)
        last, size = await self._store.read(lambda db: db.execute(query).one())
        return _Tail(int(last), int(size))

    def _forget_old_tails(self) -> None:
        for build_id in list(self._tails)[: max(0, len(self._tails) - _REMEMBERED_TAILS)]:
            tail = self._tails[build_id]
            if not (tail.pending or tail.committing or tail.readers):
                del self._tails[build_id]

    async def run(self) -> None:
        """Commit in groups until cancelled; what is pending then is committed by `flush`."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            self._urgent.clear()
            try:
                await self.flush()
            except InternalError:
                # The store has logged why. Nothing is lost yet: try again.
                self._wake.set()
                await asyncio.sleep(COMMIT_SECONDS)

    async def flush(self) -> None:
        """Commit everything that is pending.

        Raises:
            InternalError: the database failed; the batches are still pending.
        """
        while self._writing is not None:
            await asyncio.wait([self._writing])
        tails = {build_id: self._tails[build_id] for build_id in self._dirty}
        self._dirty.clear()
        chunks: list[tuple[str, list[events_pb.ProgressBatch]]] = []
        for build_id, tail in tails.items():
            tail.committing, tail.pending = tail.committing + tail.pending, []
            tail.pending_bytes = 0
            chunks.extend((build_id, chunk) for chunk in _chunks(tail.committing))
        if not chunks:
            return
        self._writing = self._store.write(lambda db: _insert(db, chunks))
        self._writing.add_done_callback(lambda done: self._written(done, tails))
        # Cancelling the waiter must not leave open whether the batches are in the store.
        await asyncio.shield(self._writing)

    def _written(self, done: asyncio.Future[int], tails: dict[str, _Tail]) -> None:
        self._writing = None
        if done.cancelled() or done.exception() is not None:
            for build_id, tail in tails.items():
                tail.pending, tail.committing = tail.committing + tail.pending, []
                self._dirty.add(build_id)
            return
        for tail in tails.values():
            tail.committing = []
        self._pending_bytes = max(0, self._pending_bytes - done.result())
        self._room.fire()

    async def read(
        self, build_id: str, *, after: int, follow: bool, ended: Callable[[], bool]
    ) -> AsyncGenerator[list[events_pb.ProgressBatch]]:
        """Replay a log in runs of about `COMMIT_BYTES`.

        Args:
            build_id: an existing build.
            after: the first batch is the one behind this number.
            follow: stay until `ended` and everything is read.
            ended: whether the build is over.

        Raises:
            GatewayUnreachableError: the gateway stops.
        """
        tail = await self._tail(build_id)
        tail.readers += 1
        try:
            while True:
                was_ended = ended()
                async for batches in self._available(build_id, tail, after):
                    after = batches[-1].sequence
                    yield batches
                if tail.last_sequence > after:
                    continue
                if not follow:
                    return
                if self._stopping:
                    raise GatewayUnreachableError(
                        "this gateway is stopping; follow the log again in a moment"
                    )
                news = await tail.changed.wait(QUIET_SECONDS if was_ended else None)
                if was_ended and not news:
                    return
        finally:
            tail.readers -= 1

    async def _available(
        self, build_id: str, tail: _Tail, after: int
    ) -> AsyncGenerator[list[events_pb.ProgressBatch]]:
        while True:
            # Memory first: what is committed while the store is read is then seen twice, not never.
            fresh = [item for item in (*tail.committing, *tail.pending) if item.sequence > after]
            if not fresh or fresh[0].sequence > after + 1:
                rows = await self._stored(build_id, after)
                for batches in rows:
                    wanted = [item for item in batches if item.sequence > after]
                    if wanted:
                        after = wanted[-1].sequence
                        yield wanted
                if len(rows) == _ROWS_PER_READ:
                    continue
            for batches in _chunks([item for item in fresh if item.sequence > after]):
                yield batches
            return

    async def _stored(self, build_id: str, after: int) -> list[list[events_pb.ProgressBatch]]:
        table = schema.build_logs
        query = (
            sa.select(table.c.batches)
            .where(table.c.build_id == build_id, table.c.last_sequence > after)
            .order_by(table.c.first_sequence)
            .limit(_ROWS_PER_READ)
        )
        return await self._store.read(
            lambda db: [_decode(frame) for frame in db.scalars(query).all()]
        )

    def wake_readers(self, build_id: str) -> None:
        """Let followers look again, because the build has ended."""
        if build_id in self._tails:
            self._tails[build_id].changed.fire()

    def stop(self) -> None:
        """End all following."""
        self._stopping = True
        for tail in self._tails.values():
            tail.changed.fire()


def _chunks(batches: list[events_pb.ProgressBatch]) -> list[list[events_pb.ProgressBatch]]:
    chunks: list[list[events_pb.ProgressBatch]] = []
    size = COMMIT_BYTES
    for batch in batches:
        if size >= COMMIT_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(batch)
        size += batch.ByteSize()
    return chunks


def _insert(db: sa.Connection, chunks: list[tuple[str, list[events_pb.ProgressBatch]]]) -> int:
    """Write chunks in the store's thread; return their bytes before compression."""
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    rows = []
    total = 0
    for build_id, batches in chunks:
        data = builds_pb.LogsResponse(batches=batches).SerializeToString()
        size = sum(batch.ByteSize() for batch in batches)
        total += size
        rows.append(
            {
                "build_id": build_id,
                "first_sequence": batches[0].sequence,
                "last_sequence": batches[-1].sequence,
                "size_bytes": size,
                "batches": compressor.compress(data),
            }
        )
    db.execute(schema.build_logs.insert(), rows)
    return total


def _decode(frame: bytes) -> list[events_pb.ProgressBatch]:
    data = zstandard.ZstdDecompressor().decompress(frame)
    return list(builds_pb.LogsResponse.FromString(data).batches)
