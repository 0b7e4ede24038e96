"""Which names the first bytes of a connection ask for: of TLS its server name, of HTTP its host.

Servers that stand behind many names choose by these, so a build that may reach one of the names
must not ask for another at the same address. Other protocols have no such name: they pass.

Sources: RFC 8446 and RFC 6066 for TLS; RFC 9112, sections 3 and 5, for HTTP/1.1; RFC 9113, section
3.4, for the beginning of HTTP/2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from offload_builder.clienthello import NotClientHelloError, parse_client_hello
from offload_builder.egress.policy.model import MAX_PORT, normal_host

MAX_HEAD_BYTES = 16_384
_MAX_RECORDS = 32
"""Of a hello; real ones are in one or two, and each more takes time to read."""
_TLS_HANDSHAKE = 22
_TLS_OTHERS = (20, 21, 23, 24)
_TLS_MAJOR = 3
_OLD_HELLO = 1
_BLANKS = b" \t\r\n\v\f"
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_METHODS = (
    b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"PRI",
    b"PROPFIND", b"REPORT", b"MKCOL", b"COPY", b"MOVE", b"LOCK", b"UNLOCK", b"MERGE", b"SEARCH",
)  # fmt: skip
_VERSION = re.compile(rb"HTTP/\d[.\d]*")
_HEAD_END = re.compile(rb"(?:\A|\n)\r?\n")
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
# Servers do not agree on where a host ends that has other bytes than these.
_AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=:%-]*@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?"
)
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a connection asks for.

    Attributes:
        hosts: names with ports, each of which must be allowed; a port of None is the connection's.
        refused: why none would do; empty otherwise.
    """

    hosts: tuple[tuple[str, int | None], ...] = ()
    refused: str = ""


NOTHING: Final = Claim()
"""A protocol without names: the address alone counts."""


def read_claim(data: bytes) -> Claim | None:
    """Return what a connection asks for by its first bytes; None while there are too few.

    What a server may take for TLS or HTTP is taken for it here, also where it is not well-formed.
    """
    if not data:
        return None
    if data[0] == _TLS_HANDSHAKE:
        return _of_tls(data)
    if data[0] in _TLS_OTHERS and data[1:2] in (b"", bytes((_TLS_MAJOR,))):
        # Servers pass over an alert that comes before the hello.
        return Claim(refused="TLS does not begin with a hello") if len(data) > 1 else None
    if data[0] & 0x80 and data[2:4] in (b"", bytes((_OLD_HELLO,)), bytes((_OLD_HELLO, _TLS_MAJOR))):
        # RFC 5246, appendix E.2: in the form of SSL 2.0, which has no room for a name.
        nameless = Claim(refused="TLS does not say which name it asks for")
        return nameless if len(data) > 3 else None
    return _of_http(data.lstrip(_BLANKS))


def _of_tls(data: bytes) -> Claim | None:
    if _in_many_records(data):
        return Claim(refused="TLS begins with a hello in too many pieces")
    try:
        hello = parse_client_hello(data)
    except NotClientHelloError as error:
        return Claim(refused=f"TLS begins wrongly: {error}")
    if isinstance(hello, int):
        return None
    if hello.hides_name:
        return Claim(refused="TLS hides the name that it asks for (ECH)")
    if not hello.server_name:
        return Claim(refused="TLS does not say which name it asks for")
    name = normal_host(hello.server_name)
    if _NAME.fullmatch(name) is None:
        return Claim(refused="TLS asks for a name that is none")
    return Claim(((name, None),))


def _in_many_records(data: bytes) -> bool:
    offset = 0
    for _ in range(_MAX_RECORDS):
        if data[offset : offset + 1] != bytes((_TLS_HANDSHAKE,)):
            return False
        offset += 5 + int.from_bytes(data[offset + 3 : offset + 5])
    return data[offset : offset + 1] == bytes((_TLS_HANDSHAKE,))


def _of_http(data: bytes) -> Claim | None:
    line, ended, rest = data.partition(b"\n")
    if not ended:
        return None if not line or _may_be_request(line) else NOTHING
    # RFC 9112, section 3: a server may take any blanks for spaces, and leave out the first.
    words = line.split()
    versions = [word for word in words[1:] if word.upper().startswith(b"HTTP/")]
    if not versions:
        # HTTP/0.9 names no host, and gets that of the server's choice.
        old = words[0].upper() in _METHODS
        return Claim(refused="HTTP does not say which host it asks for") if old else NOTHING
    if len(words) < 3 or versions != words[-1:] or not _VERSION.fullmatch(versions[0].upper()):
        return Claim(refused="HTTP begins with a line that is none")
    method, target = words[0].upper(), b" ".join(words[1:-1]).decode("latin-1")
    if method == b"PRI":
        return Claim(refused="HTTP/2 without TLS hides the host that it asks for")
    end = _HEAD_END.search(rest)
    if end is None:
        too_long = len(data) >= MAX_HEAD_BYTES
        return Claim(refused="the head of an HTTP request is too long") if too_long else None
    return _of_head(method, target, rest[: end.start()].split(b"\n") if end.start() else [])


def _may_be_request(line: bytes) -> bool:
    """Return whether the beginning of a line may become a request, of any method.

    Who sends it piece by piece must not get past by that.
    """
    word = line.split(maxsplit=1)[0]
    if len(word) < len(line) and word.upper() not in _METHODS and b"\0" in line:
        return False
    return _TOKEN.fullmatch(word) is not None


def _of_head(method: bytes, target: str, head: list[bytes]) -> Claim:
    texts: list[str] = []
    for line in (raw.removesuffix(b"\r") for raw in head):
        name, colon, value = line.partition(b":")
        # Some servers take a lone carriage return for the end of a line.
        odd = _CONTROL.search(line) is not None
        if odd or line[:1] in (b" ", b"\t") or not colon or name != name.strip():
            return Claim(refused="the head of an HTTP request has a line that is none")
        if name.lower() == b"host":
            texts.append(value.decode("latin-1").strip())
    if len(set(texts)) != 1:
        return Claim(refused="HTTP does not say which host it asks for, or says more than one")
    _, scheme, after = target.partition("://")
    if method == b"CONNECT":
        texts = [target]
    elif scheme and not target.startswith("/"):
        texts.append(after.partition("/")[0].partition("?")[0])
    hosts: list[tuple[str, int | None]] = []
    for text in texts:
        found = _AUTHORITY.fullmatch(text)
        if found is None or int(found.group(2) or 0) > MAX_PORT:
            return Claim(refused="HTTP asks for a host that is none")
        port = int(found.group(2)) if found.group(2) and method == b"CONNECT" else None
        hosts.append((normal_host(found.group(1).strip("[]")), port))
    return Claim(tuple(hosts))
