"""The socket of a helper for our own commands; `control.py` asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self

from offload_client.resident.request import peer_uid
from offload_client.sessions.listeningsocket import ListeningSocket
from offload_core.aio import TaskSet, finish
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    Answer = Callable[[], Awaitable[dict[str, Any]]]

REQUEST_SECONDS = 5.0
MAX_REQUEST = 4096
MAX_ASKING = 32


class ControlServer:
    """Answers requests of one line; a context manager."""

    def __init__(self, path: Path, answers: Mapping[str, Answer], uid: int) -> None:
        """Prepare.

        Args:
            path: of the socket; its directory belongs to the user alone.
            answers: by what is asked for.
            uid: of the user who may ask.
        """
        self._path = path
        self._answers = answers
        self._uid = uid
        self._tasks = TaskSet()
        self._room = asyncio.Semaphore(MAX_ASKING)
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
        # The answer to "stop" may be on its way.
        await finish(self._tasks.drain(0.2), 1)
        await finish(self._tasks.close(), 6)
        if self._listener is not None:
            self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                self._room.release()
                await asyncio.sleep(0.1)
                continue
            self._tasks.start(self._serve(connection), name="command")

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            if peer_uid(connection) != self._uid:
                return
            async with asyncio.timeout(REQUEST_SECONDS):
                request = b""
                while not request.endswith(b"\n") and len(request) < MAX_REQUEST:
                    part = await loop.sock_recv(connection, MAX_REQUEST)
                    if not part:
                        return
                    request += part
            answer = await self._answered(request)
            async with asyncio.timeout(REQUEST_SECONDS):
                await loop.sock_sendall(connection, json.dumps(answer).encode() + b"\n")
        except (OSError, TimeoutError):
            """Nobody to tell."""
        finally:
            connection.close()
            self._room.release()

    async def _answered(self, request: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError, AttributeError):
            answer = self._answers.get(json.loads(request).get("do"))
            if answer is not None:
                try:
                    return await answer()
                except OffloadError as error:
                    return {"error": error.message, "hint": error.hint}
        return {"error": "this helper does not know the request", "hint": ""}
