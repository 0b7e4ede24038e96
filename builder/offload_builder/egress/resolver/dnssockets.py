"""Sockets at the gateway addresses of a project, in the namespace of the node's router."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from offload_builder.egress.resolver.listening import DnsSockets
from offload_builder.egress.resolver.upstreams import DNS_PORT
from offload_core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.egress.firewall.namespaces import NetworkNamespace

_IP_FREEBIND = 15
_IPV6_FREEBIND = 78
_BACKLOG = 64


async def open_dns_sockets(
    space: NetworkNamespace, addresses: Sequence[str], port: int = DNS_PORT
) -> DnsSockets:
    """Bind sockets for DNS in a network namespace.

    The addresses need not be there yet: rules and sockets can be ready before a link is.

    Args:
        space: the namespace.
        addresses: to listen at, IPv4 or IPv6; the gateway addresses of one project.
        port: to listen at.

    Raises:
        InternalError: an address cannot be used.
    """
    try:
        return await space.run(bind_dns_sockets, addresses, port)
    except OSError as error:
        raise InternalError(
            f"cannot listen for names at {', '.join(addresses)}: {error.strerror}"
        ) from error


def bind_dns_sockets(addresses: Sequence[str], port: int = DNS_PORT) -> DnsSockets:
    """Bind sockets for DNS in the namespace of this thread.

    Raises:
        OSError: an address cannot be used.
    """
    made: list[socket.socket] = []
    try:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            made += [_bound(address, port, kind) for address in addresses]
    except OSError:
        for sock in made:
            sock.close()
        raise
    return DnsSockets(udp=tuple(made[: len(addresses)]), tcp=tuple(made[len(addresses) :]))


def _bound(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    version6 = ":" in address
    sock = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        if version6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind is socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
