"""The directories of sessions that are kept on this node, one process for each."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.sessions.engine.rootfs import BINDS
from offload_builder.node.sessions.sync.supply import Supply
from offload_builder.node.sessions.sync.workerlink import SyncWorker
from offload_core.aio import TaskSet, stop
from offload_core.errors import NodeLostError, OffloadError, QuotaExceededError, UsageError
from offload_core.sparselog import SparseLog
from offload_proto.v1.session_sync_service_pb2 import SyncRequest, SyncResponse, SyncWant

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from offload_builder.node.contextstore import ContextStore
    from offload_proto.v1.session_sync_service_pb2 import SyncOpen, SyncPart

log = SparseLog(structlog.get_logger(__name__))

MAX_DIRECTORIES = 32
"""Of one session; each has a process of some 25 MB."""
_ROOT_ID = re.compile(r"[0-9a-f]{16,64}")
_QUEUED = 4
_OPEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SyncPlace:
    """Where directories of a session are kept.

    Attributes:
        session_id: of the session.
        pid: first process of the namespaces of its engine; None to stay outside, for tests.
        store: context files of the project that its member may use; None for none.
        binds: directory of all copies, as a process in those namespaces sees it.
    """

    session_id: str
    pid: int | None
    store: ContextStore | None
    binds: Path = Path(BINDS)


@dataclass
class _Kept:
    """One directory."""

    worker: SyncWorker
    stack: AsyncExitStack
    taken: asyncio.Lock = field(default_factory=asyncio.Lock)
    call: asyncio.Task[object] | None = None


class SyncDesk:
    """The processes of all sessions; an async context manager that ends them."""

    def __init__(self) -> None:
        self._sessions: dict[str, dict[str, _Kept]] = defaultdict(dict)
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for session_id in list(self._sessions):
            await self.end(session_id)

    async def end(self, session_id: str) -> None:
        """End the processes of a session; before its engine is paused or removed.

        Calls end with `NodeLostError`. The copies stay; when the session has woken up, the next
        call goes on with them.
        """
        for kept in self._sessions.pop(session_id, {}).values():
            await kept.stack.aclose()

    async def sync(
        self, place: SyncPlace, requests: AsyncIterator[SyncRequest]
    ) -> AsyncGenerator[SyncResponse]:
        """Serve one call.

        Raises:
            UsageError: the client says what makes no sense.
            QuotaExceededError: the session has too many directories, or one is too large.
            NodeLostError: the session was paused or has ended.
        """
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("message") != "open":
            raise UsageError("the first message of this call must be SyncOpen")
        kept = await self._kept(place, first.open)
        if kept.call is not None:
            # Its connection is dead, and this node has not noticed.
            kept.call.cancel()
        async with kept.taken:
            relay = _Relay(kept.worker, Supply(place.store))
            kept.call = relay.task
            try:
                async with aclosing(relay.run(first, requests)) as responses:
                    async for response in responses:
                        yield response
            except OffloadError:
                if not relay.taken_over:
                    # Its process has ended, or is not to be trusted with what comes next.
                    self._forget(place.session_id, first.open.root_id, kept)
                    await kept.stack.aclose()
                raise
            finally:
                kept.call = None

    async def _kept(self, place: SyncPlace, message: SyncOpen) -> _Kept:
        root_id = message.root_id
        if not _ROOT_ID.fullmatch(root_id):
            raise UsageError("the name of a synchronised directory must be hex digits")
        async with self._starting:
            kept = self._sessions[place.session_id].get(root_id)
            if kept is not None:
                return kept
            if len(self._sessions[place.session_id]) >= MAX_DIRECTORIES:
                raise QuotaExceededError(
                    f"the session has {MAX_DIRECTORIES} synchronised directories already",
                    hint="mount a directory that is above several of them",
                )
            async with AsyncExitStack() as stack:
                worker = await stack.enter_async_context(
                    SyncWorker(place.pid, place.binds / root_id, f"{BINDS}/{root_id}")
                )
                kept = _Kept(worker, stack.pop_all())
            self._sessions[place.session_id][root_id] = kept
            return kept

    def _forget(self, session_id: str, root_id: str, kept: _Kept) -> None:
        if self._sessions.get(session_id, {}).get(root_id) is kept:
            del self._sessions[session_id][root_id]
            if not self._sessions[session_id]:
                del self._sessions[session_id]


class _Relay:
    """One call: hands messages on, and content to and from the project's store."""

    def __init__(self, worker: SyncWorker, supply: Supply) -> None:
        self._worker = worker
        self._supply = supply
        self.taken_over = False
        self._outgoing: asyncio.Queue[SyncResponse] = asyncio.Queue(_QUEUED)
        self.task: asyncio.Task[object] = asyncio.get_running_loop().create_task(
            _forever(), name="sync-call"
        )

    async def run(
        self, first: SyncRequest, requests: AsyncIterator[SyncRequest]
    ) -> AsyncGenerator[SyncResponse]:
        loop = asyncio.get_running_loop()
        await self._worker.send(first)
        supplying = TaskSet()
        to_worker = loop.create_task(self._to_worker(requests))
        from_worker = loop.create_task(self._from_worker(supplying))
        try:
            while True:
                taking = loop.create_task(self._outgoing.get())
                ends = (to_worker, from_worker, self.task)
                try:
                    await asyncio.wait((taking, *ends), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not taking.done():
                        taking.cancel()
                if taking.done() and not taking.cancelled():
                    yield taking.result()
                    continue
                if self.task.done():
                    self.taken_over = True
                    raise QuotaExceededError("another call has taken over this directory")
                for end in (from_worker, to_worker):
                    if end.done():
                        end.result()
                return
        finally:
            await supplying.close()
            await stop(to_worker, from_worker, self.task, expected=(OffloadError,))
            try:
                await self._worker.disconnected()
            except NodeLostError:
                log.info("sync.worker.gone")

    async def _to_worker(self, requests: AsyncIterator[SyncRequest]) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "open":
                raise UsageError("SyncOpen comes once")
            if kind == "content":
                await self._supply.keep(request.content)
            await self._worker.send(request)

    async def _from_worker(self, supplying: TaskSet) -> None:
        while True:
            response = await self._worker.receive()
            if response.WhichOneof("message") == "want":
                rest, here = await self._supply.missing(response.want)
                if here:
                    supplying.start(self._give(here), name="sync-supply")
                if rest is None:
                    continue
                response = SyncResponse(want=rest)
            await self._outgoing.put(response)

    async def _give(self, parts: Sequence[SyncPart]) -> None:
        async with aclosing(self._supply.found(parts)) as found:
            async for item in found:
                if isinstance(item, SyncWant):
                    await self._outgoing.put(SyncResponse(want=item))
                else:
                    await self._worker.send(SyncRequest(content=item))


async def _forever() -> None:
    await asyncio.Event().wait()
