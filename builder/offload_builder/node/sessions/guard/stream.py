"""One connection to an engine whose requests are looked at; its replies pass unread.

A request whose head needs nothing goes on byte for byte as it comes. Some are changed or answered
here; docker's clients send a request after the reply to the one before, so an answer of ours never
comes between two of the engine's. After an upgrade everything passes unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.sessions.room import MAX_PIECE
from offload_core.enginehttp import MAX_HEAD, RequestReader, error_response
from offload_core.errors import NodeLostError, OffloadError, UsageError
from offload_core.sparselog import SparseLog

if TYPE_CHECKING:
    from pathlib import Path

    from offload_core.enginehttp import RequestHead

log = SparseLog(structlog.get_logger(__name__))

_ONE_READ = 1 << 18
"""A unix socket holds about as much."""
MAX_WAITING = 1 << 20
"""Bytes of answers of ours that the client has not taken."""
_BUFFER_BYTES = 1 << 20
"""A unix socket takes 208 KiB otherwise, and each of them waits for the engine."""
CONNECT_SECONDS = 10.0
_STREAMS = (b"application/vnd.docker.raw-stream", b"application/vnd.docker.multiplexed-stream")


class Exchange:
    """One request that is looked at, and what becomes of it."""

    def __init__(self, head: RequestHead, reader: RequestReader, stream: GuardedStream) -> None:
        self.head = head
        self._reader = reader
        self._stream = stream

    async def read_body(self, limit: int) -> bytes:
        """Return the whole body.

        Raises:
            UsageError: it is too long, or no HTTP.
        """
        return await self._reader.read_body(limit)

    async def pass_on(self, head: bytes | None = None, body: bytes | None = None) -> None:
        """Let the engine have the request.

        Args:
            head: instead of its own.
            body: instead of what has not been read of it.
        """
        await self._stream.send(self.head.raw if head is None else head)
        if body is not None:
            await self._stream.send(body)
            return
        async for block in self._reader.body():
            await self._stream.send(block)

    async def answer(self, data: bytes) -> None:
        """Give the client bytes as if the engine had said them."""
        await self._stream.say(data)


Handler = Callable[[Exchange], Awaitable[None]]
"""Passes a request on, or answers it."""
Rules = Callable[["RequestHead"], "Handler | None"]
"""Returns what looks at a request; None to let it pass."""


class GuardedStream:
    """A connection (`contract.EngineStream`); `open` makes it.

    Args:
        connection: to the engine; this object closes it.
        rules: say what looks at which request.
    """

    def __init__(self, connection: socket.socket, rules: Rules) -> None:
        self._socket = connection
        self._rules = rules
        self._loop = asyncio.get_running_loop()
        self._incoming: deque[bytes] = deque()
        self._incoming_bytes = 0
        self._taken_bytes = 0
        """Of them, what is read or sent just now."""
        self._ended = False
        self._own: deque[bytes] = deque()
        self._own_bytes = 0
        self._raw = False
        self._over = False
        """Nothing more comes but what `_own` has."""
        self._broken: OSError | None = None
        self._moved = asyncio.Event()
        """Set at every change that the client's two tasks or the pump wait for."""
        self._readable: asyncio.Future[None] | None = None
        self._reply: bytearray | None = None
        """The beginning of a reply that says whether the connection is upgraded."""
        self._upgraded: asyncio.Future[bool] | None = None
        self._pump = asyncio.create_task(self._run(), name="session.guard")

    @classmethod
    async def open(cls, path: Path, rules: Rules) -> GuardedStream:
        """Connect to an engine.

        Raises:
            NodeLostError: it takes no connections.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
        except (OSError, TimeoutError) as error:
            connection.close()
            cause = error.strerror if isinstance(error, OSError) and error.strerror else "too busy"
            raise NodeLostError(f"the session's docker engine does not answer: {cause}") from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, rules)

    # The client's side.

    async def write(self, data: bytes, ahead: int = MAX_PIECE) -> None:
        """Send bytes to the engine.

        Args:
            data: what to send.
            ahead: bytes that the engine may not have taken yet when this returns.

        Raises:
            OSError: it takes no more.
        """
        self._check()
        if self._raw:
            await self._loop.sock_sendall(self._socket, data)
            return
        self._incoming.append(data)
        self._incoming_bytes += len(data)
        self._move()
        while not self._raw and self._incoming_bytes > ahead:
            await self._wait()
            self._check()

    async def end(self) -> None:
        """Say that nothing more is sent; what the engine has to say still comes."""
        self._ended = True
        self._move()
        if self._raw:
            self._shut_down(socket.SHUT_WR)

    async def read(self, most: int = MAX_PIECE) -> bytes:
        """Return what the engine says, at most so many bytes; b"" at the end and after `cut`.

        Raises:
            OSError: the connection broke.
        """
        while True:
            if self._own:
                data = self._own.popleft()
                self._own_bytes -= len(data)
                self._move()
                return data
            if self._over:
                return b""
            try:
                data = self._receive(most)
            except (BlockingIOError, InterruptedError):
                await self._until_readable()
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                self._over = True
            if self._reply is not None:
                self._look(data)
            return data

    def cut(self) -> None:
        """Let whatever waits for this connection come to its end now."""
        self._over = True
        self._broken = self._broken or BrokenPipeError(errno.EPIPE, "the session was cut")
        self._shut_down(socket.SHUT_RDWR)
        self._move()

    async def close(self) -> None:
        """Let go of it; nobody reads or writes any more."""
        self.cut()
        self._pump.cancel()
        try:
            await asyncio.wait((self._pump,))
        finally:
            self._socket.close()

    # The engine's side, for exchanges.

    async def send(self, data: bytes) -> None:
        """Send bytes to the engine, past all others.

        Raises:
            OSError: it takes no more.
        """
        if data:
            await self._loop.sock_sendall(self._socket, data)

    async def say(self, data: bytes) -> None:
        """Give the client bytes once it has taken enough of those before."""
        while self._own_bytes >= MAX_WAITING and not self._over:
            await self._wait()
        self._own.append(data)
        self._own_bytes += len(data)
        self._move()

    def _receive(self, most: int) -> bytes:
        """Return what is there, and no more: whoever waits for a little gets it at once."""
        data = self._socket.recv(min(_ONE_READ, most))
        if len(data) < _ONE_READ // 2:
            return data
        pieces, size = [data], len(data)
        while size < most:
            try:
                more = self._socket.recv(min(_ONE_READ, most - size))
            except (BlockingIOError, InterruptedError, ConnectionResetError):
                break
            if not more:
                # The next read finds the end once more.
                break
            pieces.append(more)
            size += len(more)
        return b"".join(pieces)

    async def _until_readable(self) -> None:
        """Wait until the engine says something, or this side has something to say for it."""
        if self._own or self._over:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._readable = waiter
        descriptor = self._socket.fileno()
        self._loop.add_reader(descriptor, self._wake_reader)
        try:
            await waiter
        finally:
            self._readable = None
            self._loop.remove_reader(descriptor)

    def _wake_reader(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    def _move(self) -> None:
        self._moved.set()
        if self._own or self._over:
            self._wake_reader()

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _shut_down(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)

    # What reads requests.

    async def _run(self) -> None:
        try:
            await self._requests()
        except OSError as error:
            self._fail(error)
        except UsageError as error:
            await self.say(error_response(400, error.message, close=True))
            self._fail(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
            self._over = True
        except Exception as error:
            log.error("session.guard.failed", exc_info=error)
            await self.say(error_response(500, "the node failed; its log says more", close=True))
            self._fail(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
            self._over = True
        finally:
            self._move()

    def _fail(self, error: OSError) -> None:
        self._broken = self._broken or error
        self._incoming.clear()

    async def _requests(self) -> None:
        reader = RequestReader(self._take)
        while (head := await reader.head()) is not None:
            handler = self._rules(head)
            exchange = Exchange(head, reader, self)
            if handler is not None:
                await self._handle(handler, exchange)
            elif head.upgrades or _hijacks(head):
                self._reply, self._upgraded = bytearray(), self._loop.create_future()
                await exchange.pass_on()
                if await self._upgraded:
                    await self.send(reader.rest())
                    break
            else:
                await exchange.pass_on()
        else:
            self._shut_down(socket.SHUT_WR)
            return
        while self._incoming:
            await self.send(self._next())
        # Nothing has been awaited since the last look: whoever writes now does it without us.
        self._raw = True
        if self._ended:
            self._shut_down(socket.SHUT_WR)
        self._move()

    async def _handle(self, handler: Handler, exchange: Exchange) -> None:
        try:
            await handler(exchange)
        except UsageError as error:
            await exchange.answer(error_response(400, _sentence(error)))
        except OffloadError as error:
            await exchange.answer(error_response(500, _sentence(error)))

    async def _take(self) -> bytes:
        self._done()
        while not self._incoming:
            if self._ended or self._broken is not None:
                return b""
            await self._wait()
        return self._next()

    def _next(self) -> bytes:
        self._done()
        data = self._incoming.popleft()
        self._taken_bytes = len(data)
        return data

    def _done(self) -> None:
        """Hear that what was taken is with the engine."""
        self._incoming_bytes -= self._taken_bytes
        self._taken_bytes = 0
        self._moved.set()

    def _look(self, data: bytes) -> None:
        """Read the head of the reply that decides whether this is still HTTP."""
        if self._reply is None or self._upgraded is None:
            return
        self._reply += data[: MAX_HEAD - len(self._reply)]
        end = self._reply.find(b"\r\n\r\n")
        if end < 0 and data and len(self._reply) < MAX_HEAD:
            return
        head = bytes(self._reply[: max(end, 0)])
        raw = head.split(b" ", 2)[1:2] == [b"101"] or any(kind in head for kind in _STREAMS)
        self._reply = None
        if not self._upgraded.done():
            self._upgraded.set_result(raw)


def _hijacks(head: RequestHead) -> bool:
    """Return whether the engine may take the connection over although nobody asked for that."""
    parts = head.path.strip("/").split("/")
    if head.method != "POST":
        return False
    attaches = len(parts) == 3 and parts[0] == "containers" and parts[2] == "attach"
    return attaches or (len(parts) == 3 and parts[0] == "exec" and parts[2] == "start")


def _sentence(error: OffloadError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message
