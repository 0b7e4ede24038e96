"""One connection to the node's copy of a directory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from offload_core.errors import NodeLostError, UsageError
from offload_core.status import error_from_rpc
from offload_core.treesync.applying import Result
from offload_core.treesync.content import zstd_usable
from offload_core.treesync.entries import from_message, to_message
from offload_core.treesync.exchange import Exchange
from offload_proto.v1.session_sync_service_pb2 import (
    SyncApply,
    SyncFlush,
    SyncOperation,
    SyncRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_core.errors import OffloadError
    from offload_core.treesync.decisions import Operation
    from offload_core.treesync.entries import Listing
    from offload_core.treesync.live import LiveReplica
    from offload_proto.v1.session_sync_service_pb2 import (
        SyncApplied,
        SyncChanges,
        SyncContent,
        SyncOpen,
        SyncOpened,
        SyncResponse,
        SyncWant,
    )

OPEN_SECONDS = 60.0
BATCH_OPERATIONS = 1000
_BATCHES = 3
_MAX_WARNING = 500


class SyncCall(Protocol):
    """What is used of a grpc.aio.StreamStreamCall of SessionSyncService.Sync."""

    async def write(self, request: SyncRequest) -> None: ...  # noqa: D102

    async def read(self) -> Any: ...  # noqa: D102

    def cancel(self) -> Any: ...  # noqa: D102


class SyncLink:
    """A call; `run` reads it until it ends.

    Args:
        call: the call, which is cancelled by `aclose`.
        live: this side.
        opened: told the answer to `open`, before what follows it.
        changes: told what the node's side has; with True once all of it that was known has come.
        warn: told sentences of the node.
    """

    def __init__(
        self,
        call: SyncCall,
        live: LiveReplica,
        *,
        opened: Callable[[SyncOpened], None],
        changes: Callable[[Listing, int, bool], None],
        warn: Callable[[str], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[BaseException] = loop.create_future()
        self._call = call
        self._told_opened = opened
        self._changes = changes
        self._warn = warn
        self._writing = asyncio.Lock()
        self._opened: asyncio.Future[SyncOpened] = loop.create_future()
        self._numbers = 0
        self._applying: dict[int, asyncio.Future[SyncApplied]] = {}
        self._flushing: dict[int, asyncio.Future[None]] = {}
        self._limit = asyncio.Semaphore(_BATCHES)
        self.exchange = Exchange(
            live.thread,
            live.replica,
            send_want=self._send_want,
            send_content=self._send_content,
            zstd=True,
            failed=self._failed,
        )

    async def aclose(self) -> None:
        """End the call; what waits for it hears of that."""
        self._call.cancel()
        waiting: list[asyncio.Future[Any]] = [self._opened, *self._applying.values()]
        for future in (*waiting, *self._flushing.values()):
            if not future.done():
                future.set_exception(NodeLostError("the connection to the session was lost"))
                future.exception()
        await self.exchange.close()

    async def open(self, message: SyncOpen) -> SyncOpened:
        """Begin.

        Raises:
            NodeLostError: the node does not answer.
        """
        message.zstd = zstd_usable()
        await self._write(SyncRequest(open=message))
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self._opened
        except TimeoutError as error:
            raise NodeLostError("the session's node does not answer") from error

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Have operations done there; parents are done before what is below them.

        Raises:
            OffloadError: the connection was lost.
        """
        results: list[Result] = []
        pending: list[asyncio.Future[SyncApplied]] = []
        for start in range(0, len(operations), BATCH_OPERATIONS):
            await self._limit.acquire()
            self._numbers += 1
            number = self._numbers
            future: asyncio.Future[SyncApplied] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: self._limit.release())
            self._applying[number] = future
            pending.append(future)
            some = operations[start : start + BATCH_OPERATIONS]
            await self._write(
                SyncRequest(apply=SyncApply(id=number, operations=map(_message, some)))
            )
        for future in pending:
            applied = await future
            for item in applied.results:
                _, now = from_message(item.now)
                results.append(Result(now, item.outcome, item.reason))
        if len(results) != len(operations):
            raise UsageError("the node answered for other operations")
        return results

    async def set_directory_mode(self, mode: int) -> None:
        """Give the directory itself permissions; they are there when this returns.

        Raises:
            OffloadError: the connection was lost.
        """
        await self._write(SyncRequest(directory_mode=mode))
        await self.flush()

    async def flush(self) -> None:
        """Wait until everything that has happened there was told.

        Raises:
            OffloadError: the connection was lost.
        """
        self._numbers += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushing[self._numbers] = future
        await self._write(SyncRequest(flush=SyncFlush(id=self._numbers)))
        await future

    async def run(self) -> None:
        """Read until the call ends.

        Raises:
            OffloadError: why it has ended.
        """
        while True:
            try:
                response = await self._call.read()
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                raise node_error(error) from error
            if response is grpc.aio.EOF:
                raise NodeLostError("the node ended the synchronisation")
            await self._take(response)

    async def _take(self, response: SyncResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "opened":
            if not self._opened.done():
                self._told_opened(response.opened)
                self._opened.set_result(response.opened)
        elif kind == "changes":
            self._take_changes(response.changes)
        elif kind == "applied":
            applied = self._applying.pop(response.applied.id, None)
            if applied is not None and not applied.done():
                applied.set_result(response.applied)
        elif kind == "flushed":
            flushed = self._flushing.pop(response.flushed.id, None)
            if flushed is not None and not flushed.done():
                flushed.set_result(None)
        elif kind == "want":
            self.exchange.wanted(response.want)
        elif kind == "content":
            await self.exchange.content(response.content)
        elif kind == "warning":
            self._warn("".join(filter(str.isprintable, response.warning))[:_MAX_WARNING])

    def _take_changes(self, message: SyncChanges) -> None:
        listing = dict(map(from_message, message.entries))
        self._changes(listing, message.sequence, not message.more)

    async def _write(self, request: SyncRequest) -> None:
        async with self._writing:
            try:
                await self._call.write(request)
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                raise node_error(error) from error

    async def _send_want(self, want: SyncWant) -> None:
        await self._write(SyncRequest(want=want))

    async def _send_content(self, content: SyncContent) -> None:
        await self._write(SyncRequest(content=content))

    def _failed(self, error: BaseException) -> None:
        if not self.lost.done():
            self.lost.set_result(error)


def node_error(error: BaseException) -> OffloadError:
    """Return the error behind a broken call to a node."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error, peer="the session's node", unreachable=NodeLostError)
    return NodeLostError("the connection to the session's node was lost")


def _message(operation: Operation) -> SyncOperation:
    return SyncOperation(
        wanted=to_message(operation.path, operation.wanted),
        expected=to_message(operation.path, operation.expected),
        aside=operation.aside.encode("utf-8", "surrogateescape"),
    )
