"""Queries by UDP and TCP (RFC 1035, 7766)."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import structlog

from offload_builder.egress.resolver.queries import MAX_TCP_BYTES
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    import socket

    from offload_builder.egress.resolver.projectview import ProjectView

_log = structlog.get_logger(__name__)
_IDLE_SECONDS = 10.0
_WRITE_SECONDS = 5.0
_MAX_CONNECTIONS = 64
_MAX_PENDING = 512


@dataclass(frozen=True, slots=True)
class DnsSockets:
    """Bound sockets of one project, in any network namespace.

    Attributes:
        udp: of datagrams.
        tcp: of streams; they listen already.
    """

    udp: tuple[socket.socket, ...]
    tcp: tuple[socket.socket, ...]

    def close(self) -> None:
        """Close all; good for once and for again."""
        for sock in (*self.udp, *self.tcp):
            sock.close()


class Listeners:
    """Serves one project at its sockets, which it closes at the end; `async with`."""

    def __init__(self, sockets: DnsSockets, view: ProjectView) -> None:
        self._sockets = sockets
        self._view = view
        self._tasks = TaskSet(_failed)
        self._pending = 0
        self._connections = 0
        self._endpoints: list[asyncio.DatagramTransport] = []
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        try:
            for sock in self._sockets.udp:
                transport, _ = await loop.create_datagram_endpoint(
                    lambda: _Datagrams(self), sock=sock
                )
                self._endpoints.append(transport)
            for sock in self._sockets.tcp:
                self._servers.append(await asyncio.start_server(self._serve_stream, sock=sock))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening, and end what is being answered."""
        for endpoint in self._endpoints:
            endpoint.close()
        for server in self._servers:
            server.close()
        await self._tasks.close()
        self._sockets.close()

    def datagram(self, transport: asyncio.DatagramTransport, data: bytes, address: Any) -> None:
        """Answer a query, unless too many are open: clients ask again."""
        if self._pending >= _MAX_PENDING:
            self._view.drop()
            return
        self._pending += 1
        self._tasks.start(self._serve_datagram(transport, data, address), name="dns query")

    async def _serve_datagram(
        self, transport: asyncio.DatagramTransport, data: bytes, address: Any
    ) -> None:
        try:
            answer = await self._view.answer(data, address[0])
            if answer is not None and not transport.is_closing():
                transport.sendto(answer, address)
        finally:
            self._pending -= 1

    async def _serve_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._connections >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections += 1
        # The server would only know the connection; the task has to end with us.
        task = self._tasks.start(self._converse(reader, writer), name="dns connection")
        task.add_done_callback(lambda _: self._gone(writer))

    def _gone(self, writer: asyncio.StreamWriter) -> None:
        self._connections -= 1
        writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = writer.get_extra_info("peername")[0]
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    wire = await reader.readexactly(size)
                answer = await self._view.answer(wire, source, limit=MAX_TCP_BYTES)
                if answer is None:
                    return
                writer.write(struct.pack("!H", len(answer)) + answer)
                async with asyncio.timeout(_WRITE_SECONDS):
                    await writer.drain()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, owner: Listeners) -> None:
        self._owner = owner
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own datagram transport does not inherit from the interface.
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if self._transport is not None:
            self._owner.datagram(self._transport, data, addr)

    def error_received(self, exc: Exception) -> None:
        _log.debug("dns.send.failed", error=str(exc))


def _failed(name: str, error: BaseException) -> None:
    _log.error("dns.query.failed", work=name, exc_info=error)
