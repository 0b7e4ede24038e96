"""The socket that docker clients use: every request goes to the engine of the session."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Self

from offload_client.sessions.copying import BROKEN, LINGER_SECONDS, copy
from offload_client.sessions.listeningsocket import ListeningSocket
from offload_client.sessions.localsocket import LocalSocket
from offload_core.aio import TaskSet, finish, stop
from offload_core.enginehttp import RequestReader, error_response
from offload_core.errors import NotFoundError, OffloadError, UsageError

if TYPE_CHECKING:
    import logging
    import socket
    from pathlib import Path
    from types import TracebackType

    from offload_client.sessions.interception import Handler, Interception
    from offload_client.sessions.nodestream import NodeStream
    from offload_client.sessions.tunnel import Tunnel
    from offload_core.enginehttp import RequestHead

MAX_CONNECTIONS = 512
AGAIN_SECONDS = 0.1
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ApiProxy:
    """Serves the socket; a context manager."""

    def __init__(
        self, path: Path, tunnel: Tunnel, interception: Interception, log: logging.Logger
    ) -> None:
        """Prepare.

        Args:
            path: of the socket; its directory belongs to the user alone.
            tunnel: to the session.
            interception: answers what concerns this machine.
            log: hears of faults.
        """
        self._path = path
        self._tunnel = tunnel
        self._interception = interception
        self._log = log
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks = TaskSet(on_error=self._failed)
        self._listener: ListeningSocket | None = None

    async def __aenter__(self) -> Self:
        self._listener = ListeningSocket(self._path)
        self._tasks.start(self._accept(self._listener.socket), name="accept")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            self._listener.remove()
        await finish(self._tasks.close(), 6)
        if self._listener is not None:
            self._listener.close()

    @property
    def in_place(self) -> bool:
        """Whether docker clients still come here."""
        return self._listener is not None and self._listener.in_place

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                self._room.release()
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            self._tasks.start(self._serve(connection), name="docker client")

    async def _serve(self, connection: socket.socket) -> None:
        local = LocalSocket(connection)
        try:
            served = _Served(local, self._tunnel, self._interception)
            await served.serve()
        except BROKEN:
            """Whoever sees it is the client; it has lost its connection."""
        finally:
            await local.aclose()
            self._room.release()

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("%s failed: %r", name, error)


class _Served:
    """One connection of a docker client."""

    def __init__(self, local: LocalSocket, tunnel: Tunnel, interception: Interception) -> None:
        self._local = local
        self._tunnel = tunnel
        self._interception = interception
        self._engine: NodeStream | None = None
        self._opened = asyncio.Event()
        self._answering = False
        """An answer of ours has begun, and nothing else may come before its end."""
        self._replied = False
        """The engine has said something, so that nobody else can answer in its place."""

    async def serve(self) -> None:
        up = asyncio.ensure_future(self._upwards())
        down = asyncio.ensure_future(self._downwards())
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if not down.done():
                # The node takes no more: why, comes the other way.
                if self._engine is not None and up.exception() is not None and not self._replied:
                    await asyncio.wait((down,), timeout=LINGER_SECONDS)
            elif not up.done() and down.exception() is None:
                # The engine has ended it; the client has what it sent and ends it too.
                await asyncio.wait((up,), timeout=LINGER_SECONDS)
        finally:
            await stop(up, down, expected=BROKEN)
            if self._engine is not None:
                await self._engine.aclose()

    async def _upwards(self) -> None:
        try:
            await self._requests()
        except OffloadError as error:
            if self._engine is not None or self._answering:
                raise
            await self._local.send(_told(error))
            await self._leave()
            return
        if self._engine is not None:
            await self._engine.half_close()
            await self._local.until_hung_up()

    async def _requests(self) -> None:
        requests = RequestReader(self._local.receive)
        while (head := await requests.head()) is not None:
            handler = self._interception.find(head)
            if handler is not None:
                if not await self._intercept(handler, head, requests):
                    await self._leave()
                    return
                continue
            engine = await self._connected()
            await engine.send(head.raw)
            if head.upgrades:
                if ahead := requests.rest():
                    await engine.send(ahead)
                await copy(self._local.receive, engine.send)
                return
            await copy(partial(anext, requests.body(), b""), engine.send)

    async def _intercept(
        self, handler: Handler, head: RequestHead, requests: RequestReader
    ) -> bool:
        """Answer a request; return whether others may follow it."""

        async def send(data: bytes) -> None:
            self._answering = True
            await self._local.send(data)

        if head.header("Expect").lower() == "100-continue":
            # The engine would say so; until then the client keeps its body.
            await self._local.send(CONTINUE)
        work = asyncio.ensure_future(handler(head, requests, send))
        gone = asyncio.ensure_future(self._local.until_hung_up())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            await work
            self._answering = False
        except OffloadError as error:
            if self._answering:
                raise
            await self._local.send(_told(error))
            return False
        finally:
            await stop(work, gone, expected=BROKEN)
        return head.stays

    async def _leave(self) -> None:
        """End the connection, whatever the client still sends: else it loses our last words."""
        await self._local.half_close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._local.receive():
                    continue

    async def _connected(self) -> NodeStream:
        if self._engine is None:
            self._engine = await self._tunnel.engine()
            self._opened.set()
        return self._engine

    async def _downwards(self) -> None:
        await self._opened.wait()
        engine = await self._connected()

        async def reply(data: bytes) -> None:
            self._replied = True
            await self._local.send(data)

        try:
            await copy(engine.receive, reply)
        except OffloadError as error:
            if self._replied or self._answering:
                raise
            await self._local.send(_told(error))
        await self._local.half_close()


def _told(error: OffloadError) -> bytes:
    """Return an error for docker's command line to show."""
    status = 500
    if isinstance(error, NotFoundError):
        status = 404
    elif isinstance(error, UsageError):
        status = 400
    text = error.message + (f" ({error.hint})" if error.hint else "")
    return error_response(status, text, close=True)
