"""gRPC calls over a unix socket, on one kept connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.messages import (
    CANCELLED,
    INTERNAL,
    UNAVAILABLE,
    GrpcError,
    MessageReader,
    message_prefix,
    status_of,
)
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from offload_builder.buildkit.h2.stream import Http2Stream


SEND_BUFFER = 2 * 2**20
"""Bytes; more than one flush."""
_SO_SNDBUFFORCE = 32
"""Linux's asm-generic/socket.h."""


class UnixConnection(asyncio.BufferedProtocol):
    """An HTTP/2 client connection on a unix socket."""

    def __init__(self) -> None:
        self.http2 = Http2Connection(self._write, client=True)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @classmethod
    async def open(cls, path: Path, timeout: float) -> UnixConnection:
        """Connect.

        Raises:
            OSError: nobody listens there.
            TimeoutError: no connection within `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            _, protocol = await loop.create_unix_connection(cls, str(path))
        return protocol

    async def close(self) -> None:
        """Say goodbye and close the socket."""
        await self.http2.close()
        if self._transport is not None:
            self._transport.abort()
            # The socket is closed in the next turn of the loop.
            await asyncio.sleep(0)

    async def _write(self, pieces: list[bytes | memoryview]) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionLostError("the socket is closed")
        self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        await self._writable.wait()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - narrows the type
        self._transport = transport
        transport.set_write_buffer_limits(high=4 * 2**20)
        _widen(transport.get_extra_info("socket"))
        self.http2.start()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Called by asyncio."""
        return self.http2.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio."""
        self.http2.filled(nbytes)
        if self.http2.drained and self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._writable.set()
        self.http2.lose(str(exc) if exc else "the daemon closed the connection")


def _widen(channel: socket.socket) -> None:
    """Let the kernel take what we send in one go; else most of it is copied once more."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        with contextlib.suppress(OSError):  # The first one needs CAP_NET_ADMIN.
            channel.setsockopt(socket.SOL_SOCKET, option, SEND_BUFFER)
            return


class ClientCall:
    """One call; leave its `async with` early to cancel it."""

    def __init__(self, stream: Http2Stream) -> None:
        self._stream = stream
        self._reader = MessageReader()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.reset()

    async def send(self, pieces: Sequence[bytes | memoryview], size: int) -> None:
        """Send one message that is the `pieces` in a row, `size` bytes in all.

        Waits while too much is unsent. The pieces must not be changed afterwards.

        Raises:
            GrpcError: the call has ended.
        """
        try:
            await self._stream.write([message_prefix(size), *pieces])
        except StreamResetError as error:
            raise _as_grpc_error(error) from error

    def end(self) -> None:
        """Say that no more messages follow."""
        self._stream.end()

    async def receive(self) -> list[bytes]:
        """Return the messages that have come, waiting for some; [] after the last one.

        Raises:
            GrpcError: the call ended with an error.
        """
        try:
            while data := await self._stream.read():
                if messages := self._reader.feed(data):
                    return messages
            await self._stream.wait_headers()
        except StreamResetError as error:
            raise _as_grpc_error(error) from error
        status = status_of(self._stream.trailers or self._stream.headers)
        if status is not None:
            raise status
        if self._reader.partial:
            raise GrpcError(INTERNAL, "the answer ended within a message")
        return []


def _as_grpc_error(error: StreamResetError) -> GrpcError:
    code = UNAVAILABLE if isinstance(error, ConnectionLostError) else CANCELLED
    return GrpcError(code, str(error))


class GrpcClient:
    """Calls to a gRPC server on a unix socket.

    The connection is opened with the first call, kept, and opened again after a loss.
    """

    def __init__(self, path: Path, *, connect_timeout: float = 10.0) -> None:
        self._path = path
        self._connect_timeout = connect_timeout
        self._connection: UnixConnection | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and close the connection."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def call(self, method: str, metadata: Sequence[tuple[str, str]] = ()) -> ClientCall:
        """Begin a call of `method`, "/package.Service/Method".

        Raises:
            GrpcError: UNAVAILABLE, nobody answers at the socket.
        """
        connection = await self._usable_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("user-agent", "offload-builder"),
            *metadata,
        ]
        try:
            return ClientCall(connection.http2.open_stream(headers))
        except StreamResetError as error:
            raise _as_grpc_error(error) from error

    async def unary(
        self, method: str, request: bytes, metadata: Sequence[tuple[str, str]] = ()
    ) -> bytes:
        """Call a method with one request and one answer; cancelling this cancels the call.

        Raises:
            GrpcError: the call failed.
        """
        async with await self.call(method, metadata) as call:
            await call.send([request], len(request))
            call.end()
            answer: bytes | None = None
            while messages := await call.receive():
                answer = messages[-1]
            if answer is None:
                raise GrpcError(INTERNAL, f"{method} ended without an answer")
            return answer

    async def stream(self, method: str, request: bytes) -> AsyncGenerator[bytes, None]:
        """Call a method with one request and a stream of answers; closing this cancels the call.

        Raises:
            GrpcError: the call failed.
        """
        async with aclosing(self.stream_runs(method, request)) as runs:
            async for messages in runs:
                for message in messages:
                    yield message

    async def stream_runs(self, method: str, request: bytes) -> AsyncGenerator[list[bytes], None]:
        """Do as `stream`, but yield all answers together that have come meanwhile.

        Raises:
            GrpcError: the call failed.
        """
        async with await self.call(method) as call:
            await call.send([request], len(request))
            call.end()
            while messages := await call.receive():
                yield messages

    async def _usable_connection(self) -> UnixConnection:
        async with self._opening:
            if self._connection is not None and not self._connection.http2.usable:
                await self._connection.close()
                self._connection = None
            if self._connection is None:
                try:
                    self._connection = await UnixConnection.open(self._path, self._connect_timeout)
                except (OSError, TimeoutError) as error:
                    text = f"cannot connect to {self._path}: {error or type(error).__name__}"
                    raise GrpcError(UNAVAILABLE, text) from error
            return self._connection
