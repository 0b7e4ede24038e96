"""Sockets in the network of a session: its ports, for the helpers of its members."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from offload_builder.egress.firewall.namespaces import NetworkNamespace
from offload_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    NodeLostError,
    NotFoundError,
    OffloadError,
)
from offload_core.trust import join_address

if TYPE_CHECKING:
    from offload_builder.node.sessions.contract import Engine

CONNECT_SECONDS = 10.0
LOOPBACK = ("127.0.0.1", "::1")
MAX_PORT = 65535


class PortDialer:
    """Connects to ports of one engine, as a program beside its containers would.

    Sockets are made by a thread that lives in the engine's network namespace while it runs, and
    belong to that namespace whoever uses them. Belongs to the event loop; `close` it.
    """

    def __init__(self) -> None:
        self._namespace: NetworkNamespace | None = None

    async def tcp(self, engine: Engine, host: str, port: int) -> socket.socket:
        """Return a connection to a TCP port.

        Args:
            engine: whose network it is.
            host: loopback address or another one of the network's own; empty for loopback.
            port: of the network.

        Raises:
            AccessDeniedError: the address is not one of this network.
            NotFoundError: nothing listens there.
            NodeLostError: the engine has gone.
        """
        return await self._connected(engine, host, port, socket.SOCK_STREAM)

    async def udp(self, engine: Engine, host: str, port: int) -> socket.socket:
        """Return a UDP socket that speaks with a port; raises as `tcp`."""
        return await self._connected(engine, host, port, socket.SOCK_DGRAM)

    async def _connected(self, engine: Engine, host: str, port: int, kind: int) -> socket.socket:
        hosts = _addresses(host, port)
        namespace = self._enter(engine)
        loop = asyncio.get_running_loop()
        failure: OSError = ConnectionRefusedError()
        for address in hosts:
            try:
                made = await namespace.run(_open, address, kind)
            except OSError as error:
                failure = error
                continue
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await loop.sock_connect(made, (address, port))
            except OSError as error:
                made.close()
                failure = error
            except BaseException:
                made.close()
                raise
            else:
                return made
        raise NotFoundError(
            f"nothing answers at {join_address(hosts[0], port)} in this session: "
            f"{failure.strerror or 'no answer'}"
        ) from failure

    def _enter(self, engine: Engine) -> NetworkNamespace:
        """Return the engine's namespace.

        Raises:
            NodeLostError: the engine has gone.
        """
        if self._namespace is None:
            # At once, for nothing here waits: whoever is cancelled leaves nothing open.
            descriptor = engine.open_network()
            try:
                self._namespace = NetworkNamespace(
                    f"session-{engine.engine_id[:8]}", Path(f"/proc/{os.getpid()}/fd/{descriptor}")
                )
            except OffloadError as error:
                raise NodeLostError("the network of this session is gone") from error
            finally:
                os.close(descriptor)
        return self._namespace

    def close(self) -> None:
        """Let go of the namespace; sockets that were given out stay."""
        namespace, self._namespace = self._namespace, None
        if namespace is not None:
            namespace.close()


def _addresses(host: str, port: int) -> tuple[str, ...]:
    if not 0 < port <= MAX_PORT:
        raise InvalidValueError(f"{port} is no port")
    if not host or host == "localhost":
        return LOOPBACK
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise InvalidValueError(f"{host[:100]!a} is no IP address") from error
    return (str(address),)


def _open(address: str, kind: int) -> socket.socket:
    """Return a socket for an address of the network that the calling thread is in."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if not ipaddress.ip_address(address).is_loopback:
        # The kernel knows which addresses are its own.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError as error:
                raise AccessDeniedError(
                    f"{address} is no address of this session; only ports of its own can be opened"
                ) from error
    made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    if kind == socket.SOCK_STREAM:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
