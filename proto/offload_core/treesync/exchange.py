"""Content to and from the other side, and operations that wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from offload_core.aio import TaskSet, finish
from offload_core.errors import NodeLostError
from offload_core.treesync.applying import Applying, Result
from offload_core.treesync.content import ContentReader, Part, batches, part_of, unpack
from offload_proto.v1.session_sync_service_pb2 import SyncWant

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from offload_core.treesync.decisions import Operation
    from offload_core.treesync.replica import Replica
    from offload_proto.v1.session_sync_service_pb2 import SyncContent

T = TypeVar("T")

WINDOW_BYTES = 16 << 20
"""Of content that was asked for and has not come; bounds the memory of both sides."""
_WANT_PARTS = 1000
_MAX_QUEUED = 100_000
"""Parts that the other side may ask for before it has got some; only who is hostile does."""
_END_SECONDS = 10.0


class ReplicaThread:
    """The one thread that touches a replica."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in it, after those that were given before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)

    async def close(self) -> None:
        """Wait for what runs, and end the thread."""
        loop = asyncio.get_running_loop()
        await finish(
            loop.run_in_executor(None, lambda: self._executor.shutdown(cancel_futures=True)),
            _END_SECONDS,
        )


class Exchange:
    """One connection's content; closed when the connection ends.

    Whoever reads the connection hands on what comes by `wanted` and `content`. Answers are written
    by a task of their own, so that two sides that write to each other never wait in a ring.
    """

    def __init__(
        self,
        thread: ReplicaThread,
        replica: Replica,
        *,
        send_want: Callable[[SyncWant], Awaitable[None]],
        send_content: Callable[[SyncContent], Awaitable[None]],
        zstd: bool,
        in_place: bool = False,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._thread = thread
        self._replica = replica
        self._send_want = send_want
        self._send_content = send_content
        self._in_place = in_place
        self._reader = ContentReader(replica, zstd=zstd)
        self._asked: deque[Part] = deque()
        self._asked_some = asyncio.Event()
        self._jobs: dict[bytes, list[_Job]] = {}
        self._outstanding = 0
        self._queue: deque[tuple[_Job, Part]] = deque()
        self._queued = asyncio.Event()
        self._open: set[_Job] = set()
        self._tasks = TaskSet(lambda _, error: failed(error))
        self.received_bytes = 0
        self.sent_bytes = 0
        self._tasks.start(self._answer(), name="sync-answers")
        self._tasks.start(self._ask(), name="sync-wants")

    async def close(self) -> None:
        """End what is under way; those who wait for operations hear of it."""
        for job in self._open:
            if not job.finished.done():
                job.finished.set_exception(NodeLostError("the connection was lost"))
                job.finished.exception()
        await self._tasks.close()
        for job in self._open:
            await self._thread.run(job.applying.abandon)
        self._open.clear()

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Do operations on this side, with content of the other.

        Raises:
            NodeLostError: the connection has ended meanwhile.
        """
        applying = Applying(self._replica, operations, self._in_place)
        await self._thread.run(applying.begin)
        job = _Job(applying)
        self._open.add(job)
        try:
            self._enqueue(job)
            if not applying.done:
                await job.finished
        finally:
            if applying.done:
                self._open.discard(job)
        return [result for result in applying.results if result is not None]

    def wanted(self, message: SyncWant) -> None:
        """Take what the other side wants; it is answered soon.

        Raises:
            UsageError: it makes no sense.
        """
        self._asked.extend(map(part_of, message.parts))
        if len(self._asked) > _MAX_QUEUED:
            raise NodeLostError("the other side of a synchronised directory wants too much")
        self._asked_some.set()

    async def content(self, message: SyncContent) -> None:
        """Take content.

        Raises:
            UsageError: it makes no sense.
        """
        self.received_bytes += len(message.data)
        found = await self._thread.run(unpack, message)
        work: dict[_Job, list[tuple[bytes, bytes | None]]] = {}
        for sha256, data in found:
            for job in self._jobs.pop(sha256, []):
                self._outstanding -= job.costs.pop(sha256, 0)
                work.setdefault(job, []).append((sha256, data))
        # What is asked for next comes while this is written.
        self._queued.set()
        for job, contents in work.items():
            await self._thread.run(job.applying.contents, contents)
            self._enqueue(job)
            if job.applying.done and not job.finished.done():
                job.finished.set_result(None)

    def _enqueue(self, job: _Job) -> None:
        self._queue.extend((job, part) for part in job.applying.wants)
        job.applying.wants.clear()
        self._queued.set()

    async def _ask(self) -> None:
        """Ask for what jobs want, as far as the window goes."""
        while True:
            await self._queued.wait()
            self._queued.clear()
            while parts := self._next_parts():
                await self._send_want(SyncWant(parts=[part.message() for part in parts]))

    def _next_parts(self) -> list[Part]:
        parts: list[Part] = []
        while self._queue and self._outstanding < WINDOW_BYTES and len(parts) < _WANT_PARTS:
            job, part = self._queue.popleft()
            others = self._jobs.get(part.sha256)
            if others is not None:
                others.append(job)
                continue
            self._jobs[part.sha256] = [job]
            job.costs[part.sha256] = part.cost
            self._outstanding += part.cost
            parts.append(part)
        return parts

    async def _answer(self) -> None:
        while True:
            await self._asked_some.wait()
            self._asked_some.clear()
            while self._asked:
                group = next(batches(self._asked))
                for _ in group:
                    self._asked.popleft()
                message = await self._thread.run(self._reader.read, group)
                self.sent_bytes += len(message.data)
                await self._send_content(message)


class _Job:
    """Operations that wait for content."""

    def __init__(self, applying: Applying) -> None:
        self.applying = applying
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.costs: dict[bytes, int] = {}
