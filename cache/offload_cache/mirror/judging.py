"""Keeps HTTP to what somebody allows, at each request and at each connection that is opened.

A name is judged when something is asked of it, and again with the address to which a socket is
about to connect. So it does not matter what a name led to a moment ago.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import aiohttp

from offload_cache.mirror.errors import RefusedError

if TYPE_CHECKING:
    from aiohttp.client_middlewares import ClientHandlerType

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_USUAL_PORTS = (80, 443)


class Judge(Protocol):
    """Decides what may be reached."""

    def __call__(self, host: str, address: Address | None, port: int, /) -> str:
        """Return why something may not be reached, in words; empty when it may.

        Args:
            host: a name or an address, as it is asked for.
            address: where it leads; None while that is not known.
            port: of TCP.
        """
        ...


@dataclass(slots=True)
class _Wish:
    """What a request is for. A connection is opened within the context of its request."""

    host: str
    proxied: bool
    refusal: str = ""


_wish: ContextVar[_Wish | None] = ContextVar("offload_judged_request", default=None)


class Guard:
    """Asks a judge for one session: its middleware, and the maker of its sockets.

    Through a proxy only host and port are judged, as the proxy is who looks up names.

    Args:
        judge: that is asked.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    async def request(
        self, request: aiohttp.ClientRequest, handler: ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Send a request if it is allowed.

        Raises:
            RefusedError: it is not, or all that answers is refused.
        """
        host, port = request.url.raw_host or "", request.url.port or 0
        if sentence := self._refusal(host, None, port):
            raise RefusedError(sentence)
        wish = _Wish(host, proxied=request.proxy is not None)
        token = _wish.set(wish)
        try:
            return await handler(request)
        except aiohttp.ClientConnectorError as error:
            if wish.refusal:
                raise RefusedError(wish.refusal) from error
            raise
        finally:
            _wish.reset(token)

    def socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """Return a socket for an address.

        Raises:
            PermissionError: the address may not be reached; the next one of the name is tried.
        """
        family, kind, protocol, _, place = info
        wish = _wish.get()
        if wish is None:
            raise PermissionError(errno.EACCES, "a connection without a request")
        if not wish.proxied:
            address, port = ipaddress.ip_address(str(place[0])), int(place[1])
            if sentence := self._refusal(wish.host, address, port):
                wish.refusal = sentence
                raise PermissionError(errno.EACCES, sentence)
        return socket.socket(family=family, type=kind, proto=protocol)

    def _refusal(self, host: str, address: Address | None, port: int) -> str:
        reason = self._judge(host, address, port)
        if not reason:
            return ""
        shown = f"[{host}]" if ":" in host else host
        shown = shown if port in _USUAL_PORTS else f"{shown}:{port}"
        return f"{shown} was refused: {reason}"
