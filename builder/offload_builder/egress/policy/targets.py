"""Hosts, networks and ports as people write them."""

from __future__ import annotations

import ipaddress
import re

from offload_builder.egress.policy.model import (
    MAX_PORT,
    PROTECTED,
    Address,
    Attempt,
    HostTarget,
    Network,
    NetworkTarget,
    PortRange,
    Protocol,
    Target,
    normal_host,
    opened_range,
    within,
)
from offload_builder.egress.policy.weburl import (
    DEFAULT_PORTS,
    AmbiguousUrlError,
    UrlTarget,
    WebUrl,
    normal_path,
)
from offload_core.errors import InvalidValueError

MAX_NAME = 253
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_RANGE = re.compile(r"([0-9]{1,5})\s*-\s*([0-9]{1,5})")
_LOOKS_LIKE_ADDRESS = re.compile(r"[0-9./]+|.*:.*")
_COMMON_PORTS = "such as 443"
_URL = re.compile(
    r"(?P<scheme>[A-Za-z]+)://(?P<place>[^/?#]*)(?P<path>/[^?#]*)?(?P<rest>[?#].*)?", re.DOTALL
)
_LOGIN = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{0,5}))?")


def parse_target(text: str) -> Target:
    """Return what a text names: a host, `*.domain`, an address, a network, or URLs.

    Raises:
        InvalidValueError: it is none of these; says what is wrong.
    """
    if "://" in text:
        return _url(text)
    if _LOOKS_LIKE_ADDRESS.fullmatch(text):
        return _network(text)
    if "/" in text:
        raise InvalidValueError(
            f'"{text[:80]}" has a path; write "https://{text[:80]}", or its host alone'
        )
    return _host(text)


def parse_host(text: str) -> str:
    """Return a name as policies have it: ASCII, lower case, no dot at its end.

    Raises:
        InvalidValueError: it is no host name.
    """
    name = normal_host(text.strip())
    if not name.isascii():
        shown = name
        try:
            name = name.encode("idna").decode("ascii")
            same = name.encode("ascii").decode("idna") == shown
        except UnicodeError as error:
            raise InvalidValueError(f'"{text[:80]}" is not a host name') from error
        if not same:
            # Such as the German sharp s: old and new rules make different names of it.
            raise InvalidValueError(
                f'"{text[:80]}" has letters that programs encode differently; write the name in '
                "its form with xn--"
            )
    if not name or len(name) > MAX_NAME or not all(map(_LABEL.fullmatch, name.split("."))):
        raise InvalidValueError(f'"{text[:80]}" is not a host name')
    return name


def _host(text: str) -> HostTarget:
    wildcard = text.startswith("*.")
    rest = text.removeprefix("*.")
    if text == "*":
        raise InvalidValueError(
            '"*" would allow or deny every name; that is what the posture is for'
        )
    if "*" in rest:
        raise InvalidValueError(
            f'"{text[:80]}" has a * where none can be; only "*.domain" is possible'
        )
    try:
        name = parse_host(rest)
    except InvalidValueError as error:
        if not rest.isascii():
            raise
        raise InvalidValueError(
            f'"{text[:80]}" is neither a host, "*.domain", an address nor a network'
        ) from error
    if name == "localhost" or name.endswith(".localhost"):
        raise InvalidValueError("localhost is the step itself, which no firewall is between")
    return HostTarget(name, wildcard)


def _url(text: str) -> UrlTarget:
    shown = f'"{text[:120]}"'
    found = _URL.fullmatch(text)
    scheme = found["scheme"].lower() if found is not None else ""
    if found is None or scheme not in DEFAULT_PORTS:
        raise InvalidValueError(f"{shown} is no URL of http or https; other protocols go by host")
    if "@" in found["place"]:
        raise InvalidValueError(f"{shown[:40]}... has a login in it; a rule is for everybody")
    if found["rest"]:
        raise InvalidValueError(
            f"{shown} has a query or fragment, which rules do not look at; leave it out"
        )
    place = _PLACE.fullmatch(found["place"])
    if place is None:
        raise InvalidValueError(f"{shown} has no host that can be understood")
    if _address(place[1].strip("[]")) is not None:
        raise InvalidValueError(
            f"{shown} has an address; URLs are judged by name, so allow or deny the address itself"
        )
    host = _host(place[1])
    port = parse_ports(place[2]).first if place[2] else DEFAULT_PORTS[scheme]
    path = found["path"] or "/"
    if path.endswith("/*"):
        path = path[:-1]
    if "*" in path:
        raise InvalidValueError(
            f'{shown} has a * where none can be; all below a path is "/path/" or "/path/*"'
        )
    try:
        path = normal_path(path)
    except AmbiguousUrlError as error:
        raise InvalidValueError(f"{shown} can be read in more than one way: {error}") from error
    return UrlTarget(scheme, host.name, host.wildcard, port, path)


def parse_web_url(text: str) -> WebUrl:
    """Return a URL that somebody wants; its path is not checked.

    A login, the query and the fragment are left out: nothing of them is kept.

    Raises:
        InvalidValueError: programs may understand its server differently, or it is no HTTP.
    """
    found = _URL.fullmatch(text)
    scheme = found["scheme"].lower() if found is not None else ""
    if found is None or scheme not in DEFAULT_PORTS:
        raise InvalidValueError("it is no URL of http or https")
    server = found["place"]
    if login := _LOGIN.match(server):
        server = server[login.end() :]
    host, port = parse_server(server)
    return WebUrl(scheme, host, port or DEFAULT_PORTS[scheme], found["path"] or "/")


def parse_server(text: str) -> tuple[str, int]:
    """Return the host and the port of HOST[:PORT]; 0 for no port.

    Raises:
        InvalidValueError: programs may understand it differently.
    """
    place = _PLACE.fullmatch(text)
    if place is None:
        raise InvalidValueError("it has no host that can be understood")
    name = place[1]
    address = _address(name.strip("[]"))
    if name.startswith("[") or address is not None:
        if address is None or (address.version == 6) is not name.startswith("["):
            raise InvalidValueError("its address cannot be understood")
        host = str(address)
    else:
        host = normal_host(name)
        labels = host.split(".")
        if len(host) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
            raise InvalidValueError("its host is no name; other letters are written with xn--")
        if _NUMBER.fullmatch(labels[-1]):
            # Some programs read 127.1 and 0x7f000001 as addresses.
            raise InvalidValueError("its host is neither a name nor an address")
    return host, parse_ports(place[2]).first if place[2] else 0


def _network(text: str) -> NetworkTarget:
    try:
        return NetworkTarget(ipaddress.ip_network(text))
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise InvalidValueError(
            f'"{text[:80]}" is not an address or network; write for example 203.0.113.0/24, '
            "and ports under the key ports"
        ) from error
    raise InvalidValueError(
        f'"{text[:80]}" has bits of a host set; write {meant}, or {text.partition("/")[0]}'
    )


def never_opened(network: Network) -> str:
    """Return why no rule can allow a network; empty when one can."""
    found = opened_range(network)
    if found is None or found.openable:
        return ""
    return f"{network} lies in {found.network} ({found.about}), which is never allowed"


def protected_inside(network: Network) -> list[Network]:
    """Return the protected ranges that a network holds without lying in one."""
    if opened_range(network) is not None:
        return []
    return [item.network for item in PROTECTED if within(item.network, network)]


def parse_ports(value: object) -> PortRange:
    """Return one port, or a range "FIRST-LAST".

    Raises:
        InvalidValueError: it is none; says what is wrong.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidValueError(f'a port is a number {_COMMON_PORTS} or a range "8000-8100"')
    if isinstance(value, int):
        first = last = value
    elif found := _RANGE.fullmatch(value.strip()):
        first, last = int(found[1]), int(found[2])
    elif value.strip().isdecimal() and len(value.strip()) <= len(str(MAX_PORT)):
        first = last = int(value)
    else:
        raise InvalidValueError(f'"{value[:40]}" is not a port; write 443 or "8000-8100"')
    if not 1 <= first <= MAX_PORT or not 1 <= last <= MAX_PORT:
        raise InvalidValueError(f"the port {value} is not between 1 and {MAX_PORT}")
    if last < first:
        raise InvalidValueError(f'the range "{value}" ends before it begins')
    return PortRange(first, last)


def join_ports(ports: list[PortRange]) -> tuple[PortRange, ...]:
    """Return ports in order, with those joined that touch or overlap."""
    joined: list[PortRange] = []
    for item in sorted(ports):
        if joined and item.first <= joined[-1].last + 1:
            joined[-1] = PortRange(joined[-1].first, max(joined[-1].last, item.last))
        else:
            joined.append(item)
    return tuple(joined)


def parse_attempt(text: str, protocol: Protocol = Protocol.TCP) -> Attempt:
    """Return what somebody wants: HOST:PORT, ADDRESS:PORT, [V6]:PORT, or a URL; no port for icmp.

    Raises:
        InvalidValueError: it is none of these.
    """
    if "://" in text:
        return _attempt_of_url(text, protocol)
    host, port = _split(text)
    if protocol is Protocol.ICMP:
        if port is not None:
            raise InvalidValueError("icmp has no ports; leave the port out")
    elif protocol is not Protocol.ANY and port is None:
        raise InvalidValueError(f'"{text[:80]}" has no port; write HOST:PORT')
    address = _address(host)
    return Attempt(None if address else parse_host(host), address, port, protocol)


def _attempt_of_url(text: str, protocol: Protocol) -> Attempt:
    if protocol is not Protocol.TCP:
        raise InvalidValueError("URLs are fetched over tcp; leave the protocol out")
    try:
        url = parse_web_url(text)
    except InvalidValueError as error:
        raise InvalidValueError(f'"{text[:120]}" cannot be explained: {error.message}') from error
    address = _address(url.host)
    return Attempt(None if address else url.host, address, url.port, protocol, url)


def _split(text: str) -> tuple[str, int | None]:
    if found := re.fullmatch(r"\[([^\]]*)\](?::([0-9]+))?", text):
        host, port = found[1], found[2]
    elif text.count(":") == 1:
        host, port = text.split(":")
    else:
        host, port = text, None
    if port is None:
        return host, None
    return host, parse_ports(port).first


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
