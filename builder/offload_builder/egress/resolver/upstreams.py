"""The servers that know names: configured ones, or those of the node's resolv.conf."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError
from offload_core.trust import join_address

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DNS_PORT = 53
_LOOK_SECONDS = 5.0
_MAX_SERVERS = 4


@dataclass(frozen=True, slots=True)
class Server:
    """A DNS server by address; `address` may have a zone, as fe80::1%eth0."""

    address: str
    port: int = DNS_PORT

    def __str__(self) -> str:
        return join_address(self.address, self.port)


def parse_server(text: str) -> Server:
    """Read "192.0.2.1", "192.0.2.1:5353", "2001:db8::1" or "[2001:db8::1]:5353".

    Raises:
        ConfigError: it is none of these.
    """
    host, port = text.strip(), str(DNS_PORT)
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    try:
        ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        number = 0
    if not 0 < number < 65536:
        raise ConfigError(f"the DNS server {text!r} is no address such as 192.0.2.1 or [::1]:53")
    return Server(host, number)


class Upstreams:
    """The servers to ask, the preferred first.

    Args:
        configured: servers; empty to take those of `resolv_conf`, which is looked at again
            whenever it changes.
        resolv_conf: the node's own file.
    """

    def __init__(self, configured: Sequence[Server], resolv_conf: Path) -> None:
        self._configured = tuple(configured)
        self._file = resolv_conf
        self._read: tuple[Server, ...] = ()
        self._stamp = -1
        self._look_at = 0.0

    def servers(self) -> tuple[Server, ...]:
        """Return the servers; empty when the node has none."""
        if self._configured:
            return self._configured
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._refresh()
        return self._read

    def _refresh(self) -> None:
        try:
            stamp = self._file.stat().st_mtime_ns
            if stamp == self._stamp:
                return
            text = self._file.read_text("utf-8", "replace")
        except OSError:
            # Replaced just now, perhaps; what was known stays good.
            return
        self._stamp = stamp
        self._read = tuple(_servers_in(text))[:_MAX_SERVERS]


def _servers_in(text: str) -> list[Server]:
    found: list[Server] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            ipaddress.ip_address(words[1])
        except ValueError:
            continue
        found.append(Server(words[1]))
    return found
