"""gRPC services inside one HTTP/2 connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.h2.messages import (
    CANCELLED,
    INTERNAL,
    INVALID_ARGUMENT,
    OK,
    UNAVAILABLE,
    UNIMPLEMENTED,
    GrpcError,
    MessageReader,
    message_prefix,
    status_trailers,
)
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError
from offload_core.aio import TaskSet
from offload_core.errors import OffloadError, find_offload_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from offload_builder.buildkit.h2.limits import Budget
    from offload_builder.buildkit.h2.stream import Http2Stream

    Handler = Callable[["ServerCall"], Awaitable[None]]
    FailureListener = Callable[[str, Exception], None]

_log = structlog.get_logger(__name__)
_ANSWER = [(":status", "200"), ("content-type", "application/grpc")]


class ServerCall:
    """One incoming call. One task may receive; any number may send."""

    def __init__(
        self,
        stream: Http2Stream,
        method: str,
        metadata: dict[str, list[str]],
        on_failure: FailureListener,
        budget: Budget | None = None,
    ) -> None:
        self.method = method
        self._budget, self._held = budget, 0
        self.metadata = metadata
        self._stream = stream
        self._on_failure = on_failure
        self._reader = MessageReader()
        self._answered = False
        self._put_back: bytes | None = None

    async def receive(self) -> list[bytes]:
        """Return the messages that have come, waiting for some; [] after the last one.

        Raises:
            GrpcError: the call was ended by the peer, or a message is not acceptable.
        """
        try:
            while data := await self._stream.read():
                if self._budget is not None:
                    self._budget.take(len(data))
                    self._held += len(data)
                if messages := self._reader.feed(data):
                    return messages
        except StreamResetError as error:
            code = UNAVAILABLE if isinstance(error, ConnectionLostError) else CANCELLED
            raise GrpcError(code, str(error)) from error
        if self._reader.partial:
            raise GrpcError(INVALID_ARGUMENT, "the request ended within a message")
        return []

    async def receive_one(self) -> bytes:
        """Return the only message of a unary call.

        Raises:
            GrpcError: there is none, or see `receive`.
        """
        if self._put_back is not None:
            return self._put_back
        messages = await self.receive()
        if len(messages) != 1:
            raise GrpcError(INVALID_ARGUMENT, "one request message is expected")
        return messages[0]

    def put_back(self, message: bytes) -> None:
        """Have `receive_one` return a message that was received already."""
        self._put_back = message

    async def send(self, messages: Iterable[bytes]) -> None:
        """Send messages; wait while too much is unsent.

        Raises:
            GrpcError: the peer ended the call.
        """
        pieces: list[bytes | memoryview] = []
        for message in messages:
            pieces.append(message_prefix(len(message)))
            pieces.append(message)
        await self._write(pieces)

    async def send_framed(self, *pieces: bytes | memoryview) -> None:
        """Send the `pieces` in a row, which are messages that have their prefixes already.

        The pieces must not be changed afterwards.

        Raises:
            GrpcError: the peer ended the call.
        """
        await self._write([piece for piece in pieces if piece])

    async def _write(self, pieces: Sequence[bytes | memoryview]) -> None:
        if not self._answered:
            self._answered = True
            self._stream.send_headers(_ANSWER)
        try:
            await self._stream.write(pieces)
        except StreamResetError as error:
            raise GrpcError(CANCELLED, str(error)) from error

    def answered(self) -> None:
        """Hear that the first header block of the answer was sent by somebody else."""
        self._answered = True

    def finish(self, code: int, message: str = "", details: bytes = b"") -> None:
        """End the call with a status."""
        if self._budget is not None:
            self._budget.give(self._held)
            self._held = 0
        trailers = status_trailers(code, message, details)
        self._stream.end(trailers if self._answered else [*_ANSWER, *trailers])

    def note_failure(self, error: Exception) -> None:
        """Say why the call fails, unless the peer itself ended it.

        A handler that tells the peer of the error in a message calls this before, because the
        peer may end everything as soon as it hears; for others the server does.
        """
        if not self.ended_by_peer:
            self._on_failure(self.method, _find_known(error) or error)

    @property
    def ended_by_peer(self) -> bool:
        """Whether the peer has cancelled the call."""
        return self._stream.failed is not None


class GrpcServer:
    """Dispatches streams to handlers by "/package.Service/Method".

    A handler returns for status OK; a `GrpcError` or `OffloadError` becomes the status of the
    call, anything else INTERNAL. `on_failure(method, error)` is told of these errors, unless the
    peer itself ended the call.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        on_failure: FailureListener,
    ) -> None:
        self._handlers = handlers
        self._on_failure = on_failure
        self._tasks = TaskSet()

    def accept(self, stream: Http2Stream) -> None:
        """Serve a new stream in the background."""
        metadata: dict[str, list[str]] = {}
        for name, value in stream.headers:
            metadata.setdefault(name, []).append(value)
        method = metadata.get(":path", [""])[0]
        call = ServerCall(stream, method, metadata, self._on_failure)
        handler = self._handlers.get(method)
        if handler is None:
            call.finish(UNIMPLEMENTED, f"{method} is not offered")
            return
        task = self._tasks.start(self._serve(call, handler), name=f"serve {method}")
        stream.on_failure = task.cancel

    async def close(self) -> None:
        """Cancel the handlers and wait for them."""
        await self._tasks.close()

    async def _serve(self, call: ServerCall, handler: Handler) -> None:
        try:
            await handler(call)
        except asyncio.CancelledError:
            call.finish(CANCELLED, "the call was cancelled")
            raise
        except Exception as error:  # noqa: BLE001 - becomes the status of the call
            self._fail(call, error)
        else:
            call.finish(OK)

    def _fail(self, call: ServerCall, error: Exception) -> None:
        call.note_failure(error)
        known = _find_known(error)
        if isinstance(known, GrpcError):
            call.finish(known.code, known.message, known.details)
        elif isinstance(known, OffloadError):
            call.finish(known.status_code, known.message)
        else:
            _log.error("session.call.failed", method=call.method, exc_info=error)
            call.finish(INTERNAL, "internal error; see the node's log")


def _find_known(error: BaseException) -> OffloadError | GrpcError | None:
    """Return the error in a group that says most, ours before the transport's; None for neither."""
    return find_offload_error(error) or _find_grpc_error(error)


def _find_grpc_error(error: BaseException) -> GrpcError | None:
    if isinstance(error, GrpcError):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            if (found := _find_grpc_error(inner)) is not None:
                return found
    return None
