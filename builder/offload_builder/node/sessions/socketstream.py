"""Connections of sessions that are plain sockets: to ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from offload_builder.node.sessions.room import MAX_PIECE

_FIRST_BYTES = 64 << 10
"""Most replies fit, and a buffer of this size costs nothing to make."""


class SocketStream:
    """A connected stream socket as an `EngineStream`; it is this object's from now on."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    async def write(self, data: bytes, ahead: int = MAX_PIECE) -> None:
        """Send bytes, all of them; raises OSError when the other side takes no more."""
        del ahead
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def end(self) -> None:
        """Send the end of this direction."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    async def read(self, most: int = MAX_PIECE) -> bytes:
        """Return what has come, at most so many bytes; waits only while nothing has."""
        size = min(most, _FIRST_BYTES)
        first = await asyncio.get_running_loop().sock_recv(self._connection, size)
        if len(first) < _FIRST_BYTES:
            return first
        parts, size = [first], len(first)
        with contextlib.suppress(BlockingIOError):
            while size < most and (more := self._connection.recv(most - size)):
                parts.append(more)
                size += len(more)
        return b"".join(parts)

    def cut(self) -> None:
        """Let pending reads and writes come to their ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close the socket."""
        self._connection.close()
