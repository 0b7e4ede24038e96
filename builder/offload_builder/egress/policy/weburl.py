"""URLs in rules and in requests, and when a path is below another for every server alike.

Servers read odd paths in different ways: some remove dot segments, decode twice, join slashes, or
take backslashes for slashes. Nothing is guessed here. A path that two servers could read
differently is `AmbiguousUrlError`, and what is left means the same to all of them. Sources: RFC
3986, 2.3, 3.3 and 6.2.2; Go's net/url, with which BuildKit writes what it asks about.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote_to_bytes

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_PATH = 4096
MAX_SHOWN = 500
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/\[\]-]|%[0-9A-Fa-f]{2})*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_MAX_LAYERS = 8


class AmbiguousUrlError(Exception):
    """A URL that servers may understand differently; its text says why, as half a sentence."""


@dataclass(frozen=True, order=True)
class WebUrl:
    """What somebody wants to fetch by HTTP.

    Attributes:
        scheme: "http" or "https".
        host: lower case, ASCII, no dot at its end; an address without brackets.
        port: of the server.
        path: as it was asked for, without the query; not checked yet.
    """

    scheme: str
    host: str
    port: int
    path: str = "/"

    def __str__(self) -> str:
        """For people and logs: of bounded length, on one line."""
        path = self.path if len(self.path) <= MAX_SHOWN else f"{self.path[:MAX_SHOWN]}..."
        return f"{_origin(self.scheme, self.host, self.port)}{printable(path)}"


@dataclass(frozen=True, order=True)
class UrlTarget:
    """URLs by a rule: one, or all below a path.

    Attributes:
        scheme: "http" or "https".
        name: host, or the domain where `wildcard`; as those of `HostTarget`.
        wildcard: names below `name`, not itself.
        port: of the server.
        path: from `normal_path`; all below it where a slash is its end.
    """

    scheme: str
    name: str
    wildcard: bool
    port: int
    path: str

    def __str__(self) -> str:
        host = f"*.{self.name}" if self.wildcard else self.name
        return f"{_origin(self.scheme, host, self.port)}{self.path}"

    def names_host(self, host: str) -> bool:
        """Return whether a host, as `WebUrl` has it, is meant."""
        return host.endswith(f".{self.name}") if self.wildcard else host == self.name

    def names_server(self, url: WebUrl) -> bool:
        """Return whether something of the server of a URL is meant."""
        return (self.scheme, self.port) == (url.scheme, url.port) and self.names_host(url.host)

    def allows(self, path: str) -> bool:
        """Return whether a path is meant, to the letter; it is from `normal_path`."""
        return path.startswith(self.path) if self.path.endswith("/") else path == self.path

    def denies(self, path: str) -> bool:
        """Return whether some server could take a path for one that is meant; it is folded."""
        below = self.path.endswith("/") and path.startswith(f"{self._folded}/")
        return path == self._folded or below

    @cached_property
    def _folded(self) -> str:
        return folded(self.path)

    def covers(self, other: UrlTarget) -> bool:
        """Return whether every URL of the other is one of this, to the letter."""
        if (self.scheme, self.port) != (other.scheme, other.port):
            return False
        if self.wildcard:
            same = other.wildcard and other.name == self.name
            named = same or other.name.endswith(f".{self.name}")
        else:
            named = not other.wildcard and other.name == self.name
        return named and self.allows(other.path)


def normal_path(path: str) -> str:
    """Return a path with needless escapes removed; of two that mean the same, one form.

    Raises:
        AmbiguousUrlError: servers may understand it differently.
    """
    if not path:
        return "/"
    if not path.startswith("/"):
        raise AmbiguousUrlError("its path does not begin with a slash")
    if len(path) > MAX_PATH:
        raise AmbiguousUrlError(f"its path has more than {MAX_PATH} characters")
    if _PATH.fullmatch(path) is None:
        raise AmbiguousUrlError("its path has characters that have to be escaped")
    slashes = path.count("/")
    text = path
    for _ in range(_MAX_LAYERS):
        _check_segments(text, slashes)
        decoded = _decoded(text)
        if decoded == text:
            return _ESCAPE.sub(_plain, path)
        text = decoded
    raise AmbiguousUrlError("its path is escaped many times")


def printable(text: str) -> str:
    """Return a text without characters that do something to terminals and logs."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _plain(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return chr(number) if number in _UNRESERVED else found[0].upper()


def _decoded(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AmbiguousUrlError("its path has escapes that are no UTF-8") from error


def _check_segments(text: str, slashes: int) -> None:
    """Refuse what could be read as another path; `text` is decoded some times."""
    for form in (text, unicodedata.normalize("NFKC", text)):
        if form.count("/") != slashes:
            raise AmbiguousUrlError("its path has an escaped slash")
        if "\\" in form:
            raise AmbiguousUrlError("its path has a backslash")
        if any(ord(char) < 0x20 or ord(char) == 0x7F for char in form):
            raise AmbiguousUrlError("its path has control characters")
        *inner, last = form.split("/")[1:]
        if not all(inner):
            raise AmbiguousUrlError("its path has two slashes side by side")
        for segment in (*inner, last):
            # "/..;x/" is a dot segment for servers with parameters, "/.. /" for others.
            name = segment.partition(";")[0]
            if segment and not name.strip(" ."):
                raise AmbiguousUrlError("its path has a segment of dots")


def folded(path: str) -> str:
    """Return a path, from `normal_path`, without what some servers do not look at.

    That is case, escapes, parameters behind a semicolon, and a slash at the end.
    """
    text = path
    for _ in range(_MAX_LAYERS):
        text = _decoded(text)
    text = unicodedata.normalize("NFKC", text).casefold()
    return "/".join(part.partition(";")[0].rstrip(" .") for part in text.split("/")).rstrip("/")


def _origin(scheme: str, host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}" if DEFAULT_PORTS[scheme] == port else f"{scheme}://{host}:{port}"
