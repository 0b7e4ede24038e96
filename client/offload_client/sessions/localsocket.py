"""Sockets of programs on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket

from offload_core.gathering import Pace

RECEIVE_BYTES = 256 << 10
"""A unix socket holds hardly more."""
_BUFFER_BYTES = 1 << 20
_HANG_UP_SECONDS = 1.0


class LocalSocket:
    """A connected stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family == socket.AF_UNIX:
            # 208 KiB otherwise; buffers of TCP grow by themselves.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._pace = Pace()

    async def receive(self) -> bytes:
        """Return what has arrived; none at the end.

        Raises:
            OSError: the connection broke.
        """
        await self._pace.rest()
        data = await self._loop.sock_recv(self._connection, RECEIVE_BYTES)
        self._pace.read(len(data))
        return data

    async def send(self, data: bytes) -> None:
        """Send bytes.

        Raises:
            OSError: the connection broke.
        """
        self._pace.answered()
        await self._loop.sock_sendall(self._connection, data)

    async def half_close(self) -> None:
        """Say that no more comes; the other direction goes on."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    async def until_hung_up(self) -> None:
        """Wait, after the end of what it sends, until the program has closed its socket.

        A read tells no difference between a program that waits for the rest of its answer and one
        that is gone.
        """
        poll = select.poll()
        if self._connection.fileno() < 0:
            return
        poll.register(self._connection, 0)
        while not poll.poll(0):
            await asyncio.sleep(_HANG_UP_SECONDS)
            if self._connection.fileno() < 0:
                return

    async def aclose(self) -> None:
        """Close it."""
        self._connection.close()
