"""Datagrams between a call of a member and a UDP port of a session."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from offload_core.aio import stop
from offload_core.errors import UsageError
from offload_core.pieces import StreamPiece

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from offload_builder.node.sessions.calls import SessionCall

IDLE_SECONDS = 60.0
"""moby's forwarding of UDP has 90 (cmd/docker-proxy, UDPConnTrackTimeout), and the kernel 30."""
MAX_DATAGRAM = 65_507
"""Bytes of data in one datagram of UDP over IPv4 (RFC 768, RFC 791)."""


class DatagramPeer:
    """One peer of a UDP port.

    Datagrams may get lost, as ever; a port where nobody listens yet is no error.

    Args:
        call: of the client.
        connection: connected socket; whoever has opened it closes it.
        count: hears of bytes from the client, and to it.
    """

    def __init__(
        self, call: SessionCall, connection: socket.socket, count: Callable[[int, int], None]
    ) -> None:
        self._call = call
        self._connection = connection
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._active = self._loop.time()
        self._over: asyncio.Future[None] = self._loop.create_future()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    async def carry(self, pieces: AsyncIterator[StreamPiece]) -> AsyncGenerator[StreamPiece, None]:
        """Yield datagrams of the port and send it the client's, until neither says anything.

        Raises:
            UsageError: the client sends what is too long for a datagram.
            OffloadError: the node has ended the call.
        """
        taking = self._loop.create_task(self._take(pieces))
        taking.add_done_callback(lambda _: self._end())
        reading = self._loop.create_task(self._read())
        self._call.on_end(self._end)
        try:
            while (left := IDLE_SECONDS - (self._loop.time() - self._active)) > 0:
                await asyncio.wait(
                    (reading, self._over), timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if self._over.done():
                    break
                if reading.done():
                    data = reading.result()
                    reading = self._loop.create_task(self._read())
                    self._active = self._loop.time()
                    self._count(0, len(data))
                    yield StreamPiece(data=data)
            self._call.check()
            if taking.done():
                taking.result()
        finally:
            self._end()
            await stop(taking, reading, expected=(Exception,))

    async def _take(self, pieces: AsyncIterator[StreamPiece]) -> None:
        async for piece in pieces:
            if piece.ended:
                return
            if len(piece.data) > MAX_DATAGRAM:
                raise UsageError(f"a datagram of {len(piece.data)} bytes is too long")
            self._active = self._loop.time()
            self._count(len(piece.data), 0)
            with suppress(OSError):
                await self._loop.sock_sendall(self._connection, piece.data)

    async def _read(self) -> bytes:
        while True:
            # An error is what ICMP said of an earlier datagram: nobody listens there.
            with suppress(OSError):
                return await self._loop.sock_recv(self._connection, MAX_DATAGRAM)
            await asyncio.sleep(0)
