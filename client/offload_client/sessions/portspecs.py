"""What a container publishes, and at which addresses of this machine.

A port that is published without an address is at the loopback addresses of this machine, and not
at all of its addresses as with an engine of its own: what a colleague in the same network should
reach is published with one, for example `-p 0.0.0.0:8080:80`.
"""

from __future__ import annotations

import errno
import re
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from offload_core.errors import InvalidValueError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LOOPBACK = ("127.0.0.1", "::1")
TRIES = 50
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
LAST_PORT = 65535
FIRST_CHOSEN = 32768
"""Engines choose from the system's ephemeral ports (net.ipv4.ip_local_port_range)."""
MAX_CHOSEN = 256
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_LOOPBACK = re.compile(r"127(?:\.[0-9]{1,3}){3}", re.ASCII)
_NO_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@dataclass(frozen=True, slots=True)
class Binding:
    """A published port.

    Attributes:
        container_port: in the container, for example "80/tcp".
        host_ip: address of this machine; empty for the loopback addresses.
        port: of this machine, and of the engine.
        engine_ip: address in the session to connect to; empty for its loopback address.
    """

    container_port: str
    host_ip: str
    port: int
    engine_ip: str = ""

    @property
    def protocol(self) -> str:
        """TCP or UDP, in small letters."""
        return self.container_port.partition("/")[2] or "tcp"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of this machine."""
        return (self.host_ip,) if self.host_ip else LOOPBACK


def bind(binding: Binding) -> list[socket.socket]:
    """Return sockets for a published port, TCP ones listening.

    Raises:
        OSError: an address is in use, is none of this machine, or may not be used.
    """
    with ExitStack() as stack:
        made = []
        for address in binding.addresses:
            try:
                made.append(stack.enter_context(_bind_one(binding, address)))
            except OSError as error:
                # A machine without IPv6 has one loopback address.
                if binding.host_ip or error.errno not in _NO_FAMILY:
                    raise
        if not made:
            raise OSError(errno.EADDRNOTAVAIL, "no loopback address")
        stack.pop_all()
    return made


def _bind_one(binding: Binding, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, KINDS[binding.protocol])
    try:
        made.setblocking(False)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if binding.protocol == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, binding.port))
        if binding.protocol == "tcp":
            made.listen(socket.SOMAXCONN)
    except BaseException:
        made.close()
        raise
    return made


def plan(
    published: Any, taken: Callable[[str, int], bool]
) -> tuple[list[Binding], dict[str, list[dict[str, str]]]]:
    """Return the ports of a container's HostConfig.PortBindings, and what the engine gets of them.

    Args:
        published: as a client wrote it.
        taken: says of a protocol and port whether they are promised to another container.

    Raises:
        InvalidValueError: it is not understood; the engine says what is wrong with it.
        QuotaExceededError: no port is free.
    """
    bindings: list[Binding] = []

    def promised(protocol: str, port: int) -> bool:
        mine = any((one.protocol, one.port) == (protocol, port) for one in bindings)
        return mine or taken(protocol, port)

    written: dict[str, list[dict[str, str]]] = {}
    if not isinstance(published, dict):
        raise InvalidValueError("PortBindings is no object")
    for container_port, places in published.items():
        if any(not isinstance(place, dict) for place in places or ()):
            raise InvalidValueError(f"a place of port {container_port} is no object")
        number, _, protocol = str(container_port).partition("/")
        if protocol not in ("", *KINDS):
            # SCTP stays within the session.
            written[container_port] = places
            continue
        key = f"{number}/{protocol or 'tcp'}"
        if not places:
            written[container_port] = places
        for place in places or ():
            wanted = _addressed(key, str(place.get("HostIp") or ""))
            binding = _choose(wanted, str(place.get("HostPort") or "0"), promised)
            bindings.append(binding)
            engine_ip = binding.engine_ip or ("" if not binding.host_ip else "127.0.0.1")
            if binding.host_ip == "0.0.0.0":  # noqa: S104 - what the person wrote
                engine_ip = binding.host_ip
            written.setdefault(container_port, []).append(
                {"HostIp": engine_ip, "HostPort": str(binding.port)}
            )
    return bindings, written


def _addressed(container_port: str, host_ip: str) -> Binding:
    if not host_ip:
        return Binding(container_port, "", 0)
    try:
        address = ip_address(host_ip)
    except ValueError as error:
        raise InvalidValueError(f"{host_ip!r} is no address") from error
    # The addresses of this machine mean nothing in the session, apart from the loopback network.
    inside = str(address) if address.version == 4 and address.is_loopback else ""
    return Binding(container_port, str(address), 0, inside)


def _choose(wanted: Binding, ports: str, taken: Callable[[str, int], bool]) -> Binding:
    first_text, _, last_text = ports.partition("-")
    try:
        first, last = int(first_text), int(last_text or first_text)
    except ValueError as error:
        raise InvalidValueError(f"{ports!r} is no port") from error
    if not 0 <= first <= last <= LAST_PORT:
        raise InvalidValueError(f"{ports!r} is no port")
    if first == last and first:
        return _at(wanted, first)
    candidates: Iterable[int] = range(first, last + 1) if first else (0 for _ in range(TRIES))
    for candidate in candidates:
        port = _free(_at(wanted, candidate))
        if port and not taken(wanted.protocol, port):
            return _at(wanted, port)
    raise QuotaExceededError(
        f"Bind for {wanted.host_ip or '0.0.0.0'}:{ports} failed: all ports are allocated"  # noqa: S104
    )


def _at(wanted: Binding, port: int) -> Binding:
    return Binding(wanted.container_port, wanted.host_ip, port, wanted.engine_ip)


def _free(wanted: Binding) -> int:
    """Return a port, if the wanted one is free; for port 0 one that the system chooses."""
    try:
        if not wanted.port:
            first = _bind_one(wanted, wanted.addresses[0])
            wanted = _at(wanted, first.getsockname()[1])
            first.close()
        for made in bind(wanted):
            made.close()
    except OSError:
        return 0
    return wanted.port


def from_engine(ports: Any) -> list[Binding]:
    """Return the ports that an engine has chosen for a running container, at loopback addresses.

    Only those that an engine chooses by itself: with others a node could pass itself off as
    something that people expect at a well-known port of this machine.

    Args:
        ports: NetworkSettings.Ports of an inspection; what is not understood is left out.
    """
    found: dict[tuple[str, int], Binding] = {}
    for container_port, places in ports.items() if isinstance(ports, dict) else ():
        number, _, protocol = container_port.partition("/")
        if protocol not in KINDS or not _PORT.fullmatch(number) or not isinstance(places, list):
            continue
        for place in places:
            text = str(place.get("HostPort")) if isinstance(place, dict) else ""
            port = int(text) if _PORT.fullmatch(text) else 0
            if FIRST_CHOSEN <= port <= LAST_PORT and len(found) < MAX_CHOSEN:
                host_ip = str(place.get("HostIp") or "")
                inside = host_ip if _LOOPBACK.fullmatch(host_ip) else ""
                found.setdefault((container_port, port), Binding(container_port, "", port, inside))
    return list(found.values())
