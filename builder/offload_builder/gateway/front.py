"""The public port: one listener, routed by the TLS server name, nothing decrypted here.

Each connection says a ClientHello; its server name leads to one of our own gRPC servers behind a
unix socket, or to a node. The TLS session is between the client and that server.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.gateway.clienthello import (
    ALERT_INTERNAL_ERROR,
    ALERT_UNRECOGNIZED_NAME,
    ClientHello,
    NotClientHelloError,
    alert,
    parse_client_hello,
)
from offload_builder.gateway.splice import Half
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


class _Downstream(Half):
    """A client's connection: read as far as its hello, then spliced."""

    def __init__(self, front: Front) -> None:
        super().__init__(front.closed)
        self._front = front
        self._hello: bytearray | None = bytearray()
        self._wanted = 1
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._front.opened(self):
            self._timer = self._loop.call_later(self._front.handshake_timeout, self.abort)

    def buffer_updated(self, nbytes: int) -> None:
        if self._hello is None:
            super().buffer_updated(nbytes)
            return
        self._hello += self._view[:nbytes]
        if len(self._hello) < self._wanted:
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
        first, self._hello = bytes(self._hello), None
        # Nothing is read until there is somewhere to write it.
        self.hold(True)
        self._front.route(self, parsed.server_name, first)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def refuse(self, description: int) -> None:
        """Answer with a TLS alert and close."""
        self.write(alert(description))
        self.close()

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
        self._halves: set[Half] = set()
        self._clients = 0
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
        for half in list(self._halves):
            half.abort()
        # Transports close in the next turns of the loop.
        for _ in range(100):
            if not self._halves:
                break
            await asyncio.sleep(0.01)

    def stop_listening(self) -> None:
        """Take no new connections; those that are open stay."""
        self._accepting = False
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def connections(self) -> int:
        """Open connections of clients."""
        return self._clients

    def opened(self, half: Half) -> bool:
        """Take a connection in; False when there are too many and it is closed again."""
        if not self._accepting or self.connections >= self._config.max_connections:
            log.warning("front.full", connections=self.connections)
            half.abort()
            return False
        _keep_alive(half)
        self._halves.add(half)
        self._clients += 1
        return True

    def closed(self, half: Half) -> None:
        """Forget a connection."""
        if half in self._halves:
            self._halves.discard(half)
            self._clients -= isinstance(half, _Downstream)

    def route(self, downstream: _Downstream, server_name: str, first: bytes) -> None:
        """Connect a client with whom it named."""
        target = self._router(server_name)
        if target is None:
            log.info("front.unknown_name", server_name=server_name[:100])
            downstream.refuse(ALERT_UNRECOGNIZED_NAME)
            return
        self._tasks.start(self._connect(downstream, target, first), name=f"dial-{server_name}")

    async def _connect(self, downstream: _Downstream, target: Route, first: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                if isinstance(target, UnixRoute):
                    _, upstream = await loop.create_unix_connection(
                        lambda: Half(self.closed), str(target.path)
                    )
                else:
                    _, upstream = await loop.create_connection(
                        lambda: Half(self.closed), target.host, target.port
                    )
        except (OSError, TimeoutError) as error:
            log.warning("front.dial.failed", target=str(target), error=str(error) or "timeout")
            downstream.refuse(ALERT_INTERNAL_ERROR)
            return
        self._halves.add(upstream)
        _keep_alive(upstream)
        if downstream.transport is None:
            upstream.abort()
            return
        downstream.join(upstream)
        upstream.write(first)
        downstream.hold(False)

    async def _sweep(self) -> None:
        """Close what has been silent for too long, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._config.idle_timeout))
            limit = loop.time() - self._config.idle_timeout
            for half in list(self._halves):
                if half.idle_since() < limit:
                    half.abort()


def _keep_alive(half: Half) -> None:
    """Let the kernel find out when the other machine is gone."""
    if half.transport is not None:
        connection = half.transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _task_failed(name: str, error: BaseException) -> None:
    log.error("front.failed", task=name, exc_info=error)
