"""Patterns over claims: `*` stays between "/" and ":", `**` crosses them, all else is literal."""

from __future__ import annotations

import re
from typing import Any

MAX_PATTERN = 1000

_WILDCARDS = re.compile(r"(\*\*|\*)")
_BORDERS = "/:"
_ONLY_WILDCARDS = re.compile(r"[*/:]*")


def claim_texts(claims: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the values of a claim as texts; none when it is missing or has no plain value.

    A name with dots is first looked for as it is, then as a path through nested objects. Of a list
    each element is a value. Numbers are written without a point, truth values as true and false.
    """
    value = claims[name] if name in claims else _nested(claims, name)
    if isinstance(value, list):
        return tuple(text for item in value if (text := _text(item)) is not None)
    text = _text(value)
    return () if text is None else (text,)


def claim_text(claims: dict[str, Any], name: str) -> str:
    """Return the one value of a claim; empty when it has none or several."""
    texts = claim_texts(claims, name)
    return texts[0] if len(texts) == 1 else ""


def matches(pattern: str, text: str) -> bool:
    """Return whether a pattern covers the whole of a text; letters count as they are written.

    Takes time in proportion to the text, whatever stands in it: a stranger may have chosen it.
    """
    places = {0}
    for part in _WILDCARDS.split(pattern):
        if part == "**":
            places = set(range(min(places), len(text) + 1))
        elif part == "*":
            places = _after_wildcard(text, places)
        else:
            places = {place + len(part) for place in places if text.startswith(part, place)}
        if not places:
            return False
    return len(text) in places


def is_wildcard_only(pattern: str) -> bool:
    """Return whether a pattern says nothing about what it matches."""
    return "*" in pattern and _ONLY_WILDCARDS.fullmatch(pattern) is not None


def _after_wildcard(text: str, begins: set[int]) -> set[int]:
    """Return where a `*` that begins at one of some places may end."""
    ends: set[int] = set()
    for place in sorted(begins):
        while place not in ends:
            ends.add(place)
            if place < len(text) and text[place] not in _BORDERS:
                place += 1  # noqa: PLW2901 - walks on
    return ends


def _nested(claims: dict[str, Any], name: str) -> Any:
    value: Any = claims
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else None
