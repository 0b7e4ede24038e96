"""What a connector may connect to: what its owner has listed, and nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

Destination = tuple[str, int]
"""Name or address, and port."""

MAX_PORT = 65535
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_ADDRESS = re.compile(r"[0-9.]+")


def parse_allowed(texts: Iterable[str]) -> dict[Destination, Destination]:
    """Return where connections go, by what builds ask for.

    Args:
        texts: "HOST:PORT", or "HOST:PORT=ADDRESS:PORT" where the host is found elsewhere.

    Raises:
        UsageError: one is neither, or names something twice.
    """
    found: dict[Destination, Destination] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        key = _destination(name, text)
        if _ADDRESS.fullmatch(key[0]) or not all(map(_LABEL.fullmatch, key[0].split("."))):
            raise UsageError(
                f'"{key[0]}" is no host name, and builds reach a connector by names; write '
                f"NAME:{key[1]}={key[0]}:{key[1]}"
            )
        if key in found:
            raise UsageError(f"--allow names {key[0]}:{key[1]} twice")
        found[key] = _destination(place, text) if equals else key
    if not found:
        raise UsageError("name at least one host that builds may reach: --allow HOST:PORT")
    return found


def _destination(text: str, whole: str) -> Destination:
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]").rstrip(".").lower()
    if not colon or not host or "/" in host or not port.isdecimal():
        raise UsageError(f'--allow takes HOST:PORT, or HOST:PORT=ADDRESS:PORT, not "{whole}"')
    number = int(port)
    if not 0 < number <= MAX_PORT:
        raise UsageError(f"there is no port {port}; ports are 1 to {MAX_PORT}")
    return host, number
