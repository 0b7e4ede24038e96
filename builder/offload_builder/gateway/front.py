"""The public port: one listener, routed by the TLS server name, nothing decrypted here.

Each connection says a ClientHello; its server name leads to one of our own gRPC servers behind a
unix socket, or to a node. The TLS session is between the client and that server.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import structlog

from offload_builder.clienthello import (
    ALERT_INTERNAL_ERROR,
    ALERT_UNRECOGNIZED_NAME,
    ClientHello,
    NotClientHelloError,
    alert,
    parse_client_hello,
)
from offload_builder.gateway.peers import socket_name
from offload_builder.gateway.ratelimits import address_keys
from offload_builder.gateway.splice import PipeStore, Splice
from offload_core.aio import TaskSet
from offload_core.errors import ConfigError
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig

log = structlog.get_logger(__name__)

DIAL_SECONDS = 5.0
_SWEEP_SECONDS = 5.0
_BACKLOG = 1024


@dataclass(frozen=True)
class UnixRoute:
    """A server of ours behind a unix socket."""

    path: Path


@dataclass(frozen=True)
class TcpRoute:
    """A node."""

    host: str
    port: int


Route = UnixRoute | TcpRoute


class _Downstream(asyncio.Protocol):
    """A client's connection until it is known where it leads to."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.address = ""
        """That it is counted as."""
        self._hello = bytearray()
        self._wanted = 1
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._handed_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._front.opened(self):
            self._timer = self._loop.call_later(self._front.handshake_timeout, self.abort)

    def data_received(self, data: bytes) -> None:
        self._hello += data
        if len(self._hello) < self._wanted or self._transport is None:
            return
        try:
            parsed = parse_client_hello(self._hello)
        except NotClientHelloError as error:
            log.debug("front.refused", reason=str(error))
            self.abort()
            return
        if not isinstance(parsed, ClientHello):
            self._wanted = parsed
            return
        self._stop_timer()
        # What follows is read when there is somewhere to write it.
        self._transport.pause_reading()
        self._front.route(self, parsed.server_name, bytes(self._hello))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._stop_timer()
        self._transport = None
        if not self._handed_over:
            self._front.closed(self)

    def hand_over(self) -> socket.socket | None:
        """Return the connection, which is the caller's from now on; None when it is gone."""
        if self._transport is None or self._transport.is_closing():
            return None
        connection: socket.socket = self._transport.get_extra_info("socket").dup()
        connection.setblocking(False)
        self._handed_over = True
        # Only the descriptor of the transport is closed by this.
        self._transport.abort()
        return connection

    @property
    def host(self) -> str:
        """IP address of the client; empty when it is gone."""
        peer = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(peer[0]) if peer else ""

    def refuse(self, description: int) -> None:
        """Answer with a TLS alert and close."""
        if self._transport is not None:
            self._transport.write(alert(description))
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Front:
    """The listener of the public port; use as an async context manager."""

    def __init__(self, config: GatewayConfig, router: Callable[[str], Route | None]) -> None:
        """Route server names with `router`; None is answered with unrecognized_name."""
        self._config = config
        self._router = router
        self._arriving: set[_Downstream] = set()
        self._by_address: Counter[str] = Counter()
        self._splices: set[Splice] = set()
        self._pipes = PipeStore()
        self._server: asyncio.Server | None = None
        self._tasks = TaskSet(_task_failed)
        self._accepting = True
        self.address = ""
        """HOST:PORT that is listened on."""

    @property
    def handshake_timeout(self) -> float:
        """Seconds in which a hello must come."""
        return self._config.handshake_timeout

    async def __aenter__(self) -> Self:
        """Begin to close what is silent; see `listen`."""
        self._tasks.start(self._sweep(), name="front-sweep")
        return self

    async def listen(self) -> None:
        """Take connections.

        Raises:
            ConfigError: the address cannot be used.
        """
        host, port = split_address(self._config.listen)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Downstream(self), host, port, backlog=_BACKLOG
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {self._config.listen}: {reason}",
                hint="set another address with --listen",
            ) from error
        bound = self._server.sockets[0].getsockname()
        self.address = join_address(bound[0], bound[1])
        log.info("front.listening", address=self.address)

    async def __aexit__(self, *exc: object) -> None:
        """Close the listener and every connection."""
        self.stop_listening()
        await self._tasks.close()
        for splice in list(self._splices):
            splice.close()
        for downstream in list(self._arriving):
            downstream.abort()
        # Transports close in the next turns of the loop.
        for _ in range(100):
            if not self._arriving:
                break
            await asyncio.sleep(0.01)
        self._pipes.close()

    def stop_listening(self) -> None:
        """Take no new connections; those that are open stay."""
        self._accepting = False
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def connections(self) -> int:
        """Open connections of clients."""
        return len(self._arriving) + len(self._splices)

    def opened(self, downstream: _Downstream) -> bool:
        """Take a connection in; False when there are too many, here or of its address.

        Then it is closed again.
        """
        address = address_keys(downstream.host)[0][0]
        alike = self._by_address[address] >= self._config.max_connections_per_address
        if not self._accepting or alike or self.connections >= self._config.max_connections:
            log.warning(
                "front.full",
                connections=self.connections,
                address=address,
                of_address=self._by_address[address],
            )
            downstream.abort()
            return False
        downstream.address = address
        self._by_address[address] += 1
        self._arriving.add(downstream)
        return True

    def closed(self, downstream: _Downstream) -> None:
        """Forget a connection that led nowhere."""
        if downstream in self._arriving:
            self._arriving.remove(downstream)
            self._left(downstream.address)

    def _left(self, address: str) -> None:
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def route(self, downstream: _Downstream, server_name: str, first: bytes) -> None:
        """Connect a client with whom it named."""
        target = self._router(server_name)
        if target is None:
            log.info("front.unknown_name", server_name=server_name[:100])
            downstream.refuse(ALERT_UNRECOGNIZED_NAME)
            return
        self._tasks.start(self._connect(downstream, target, first), name=f"dial-{server_name}")

    async def _connect(self, downstream: _Downstream, target: Route, first: bytes) -> None:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                upstream = await _dial(target, first, downstream.host)
        except (OSError, TimeoutError) as error:
            log.warning("front.dial.failed", target=str(target), error=str(error) or "timeout")
            downstream.refuse(ALERT_INTERNAL_ERROR)
            return
        client = downstream.hand_over()
        if client is None:
            upstream.close()
            return
        _keep_alive(client)
        address = downstream.address

        def ended(splice: Splice) -> None:
            self._splices.discard(splice)
            self._left(address)

        splice = Splice(client, upstream, self._pipes, ended)
        self._splices.add(splice)
        self._arriving.discard(downstream)
        splice.start()

    async def _sweep(self) -> None:
        """Close what has been silent for too long, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._config.idle_timeout))
            limit = loop.time() - self._config.idle_timeout
            for splice in list(self._splices):
                if splice.last_activity < limit:
                    splice.close()


async def _dial(target: Route, first: bytes, host: str) -> socket.socket:
    """Return a connection to a target that has got the first bytes.

    Args:
        target: where to.
        first: what the client has sent already.
        host: IP address of the client, which servers of ours are told.

    Raises:
        OSError: it cannot be reached.
    """
    if isinstance(target, UnixRoute):
        name = socket_name(host) if sys.platform == "linux" else None
        return await _reach(socket.AF_UNIX, str(target.path), first, name)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    failure = OSError(f"{target.host} has no address")
    for family, _, _, _, address in found:
        try:
            return await _reach(family, address, first)
        except OSError as error:
            failure = error
    raise failure


async def _reach(
    family: int,
    address: str | tuple[str | int | bytes, ...],
    first: bytes,
    name: bytes | str | None = None,
) -> socket.socket:
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        connection.setblocking(False)
        _keep_alive(connection)
        if name is not None:
            connection.bind(name)
        await loop.sock_connect(connection, address)
        await loop.sock_sendall(connection, first)
        stack.pop_all()
    return connection


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out when the other machine is gone, and wait for nothing."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _task_failed(name: str, error: BaseException) -> None:
    log.error("front.failed", task=name, exc_info=error)
