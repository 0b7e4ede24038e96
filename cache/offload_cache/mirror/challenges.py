"""What a registry asks for in `WWW-Authenticate`: RFC 9110, 11.6.1."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)(?:\s+|$)")
_PARAMETER = re.compile(
    r'\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))'
)
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme and its parameters, names in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """Return the challenges of all headers, in order; a header is read until it is broken."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        while (scheme := _SCHEME.match(header, position)) is not None:
            position = scheme.end()
            parameters: dict[str, str] = {}
            while (match := _PARAMETER.match(header, position)) is not None:
                quoted = match[2]
                value = _ESCAPE.sub(r"\1", quoted) if quoted is not None else match[3]
                parameters[match[1].lower()] = value
                position = match.end()
            found.append(Challenge(scheme[1].lower(), parameters))
    return found
