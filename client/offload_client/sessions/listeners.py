"""Listening at a port of this machine for a port of a session."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

from offload_client.sessions.copying import BROKEN, carry
from offload_client.sessions.localsocket import LocalSocket
from offload_core.aio import TaskSet, stop
from offload_core.sockets import keep_alive, reset

if TYPE_CHECKING:
    import socket

    from offload_client.sessions.nodestream import PortStream
    from offload_client.sessions.portspecs import Binding
    from offload_client.sessions.tunnel import Tunnel

MAX_CONNECTIONS = 1024
MAX_PEERS = 256
PEER_IDLE_SECONDS = 60.0
PEER_QUEUE = 128
"""Datagrams that wait for the network; more are lost, as they are on any slow way."""
AGAIN_SECONDS = 0.1


class TcpListener:
    """Carries connections to one published port."""

    def __init__(self, listening: socket.socket, binding: Binding, tunnel: Tunnel) -> None:
        """Begin.

        Args:
            listening: belongs to this from now on.
            binding: the published port.
            tunnel: to the session.
        """
        self._listening = listening
        self._binding = binding
        self._tunnel = tunnel
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks = TaskSet()
        self._accepting = asyncio.ensure_future(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(self._listening)
            except OSError:
                # Out of descriptors, or the peer is gone already.
                self._room.release()
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            except asyncio.CancelledError:
                self._room.release()
                raise
            self._tasks.start(self._serve(connection), name="port")

    async def _serve(self, connection: socket.socket) -> None:
        whole = False
        try:
            keep_alive(connection)
            node = await self._tunnel.port(self._binding.port, self._binding.engine_ip)
            try:
                whole = await carry(LocalSocket(connection), node)
            finally:
                await node.aclose()
        except BROKEN:
            """Told by the reset."""
        finally:
            self._room.release()
            if whole:
                connection.close()
            else:
                reset(connection)

    def close(self) -> None:
        """Take no more connections; those that are open end with the container."""
        self._accepting.cancel()
        self._listening.close()

    async def aclose(self) -> None:
        """End everything."""
        self.close()
        await self._tasks.close()


class UdpListener(asyncio.DatagramProtocol):
    """Carries datagrams to one published port, each peer by a stream of its own."""

    def __init__(self, bound: socket.socket, binding: Binding, tunnel: Tunnel) -> None:
        """Begin.

        Args:
            bound: belongs to this from now on.
            binding: the published port.
            tunnel: to the session.
        """
        self._bound = bound
        self._binding = binding
        self._tunnel = tunnel
        self._peers: dict[Any, asyncio.Queue[bytes]] = {}
        self._tasks = TaskSet()
        self._transport: asyncio.DatagramTransport | None = None
        self._tasks.start(self._open(), name="udp")

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, sock=self._bound)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Hand a datagram to its peer's stream."""
        queue = self._peers.get(addr)
        if queue is None:
            if len(self._peers) >= MAX_PEERS:
                return
            queue = self._peers[addr] = asyncio.Queue(PEER_QUEUE)
            self._tasks.start(self._serve(addr, queue), name="peer")
        with contextlib.suppress(asyncio.QueueFull):
            queue.put_nowait(data)

    async def _serve(self, peer: Any, queue: asyncio.Queue[bytes]) -> None:
        try:
            node = await self._tunnel.datagrams(self._binding.port, self._binding.engine_ip)
            try:
                await self._carry(peer, queue, node)
            finally:
                await node.aclose()
        except BROKEN:
            """Datagrams may be lost."""
        finally:
            del self._peers[peer]

    async def _carry(self, peer: Any, queue: asyncio.Queue[bytes], node: PortStream) -> None:
        loop = asyncio.get_running_loop()
        used = loop.time()

        async def back() -> None:
            nonlocal used
            while data := await node.receive():
                used = loop.time()
                if self._transport is not None:
                    self._transport.sendto(data, peer)

        async def there() -> None:
            nonlocal used
            while True:
                data = await queue.get()
                used = loop.time()
                await node.send(data)

        ways = asyncio.ensure_future(back()), asyncio.ensure_future(there())
        try:
            while (left := used + PEER_IDLE_SECONDS - loop.time()) > 0:
                done, _ = await asyncio.wait(
                    ways, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    return
        finally:
            await stop(*ways, expected=BROKEN)

    def close(self) -> None:
        """Take no more datagrams."""
        if self._transport is not None:
            self._transport.abort()
        self._bound.close()

    async def aclose(self) -> None:
        """End everything."""
        self.close()
        await self._tasks.close()
