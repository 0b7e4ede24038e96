"""Texts of clients and nodes that others see: without anything that would steer their terminals."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_BREAKS = re.compile(r"[\t\n]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def plain_text(text: str, characters: int) -> str:
    """Return at most so many characters; lines and tabs stay, other control characters do not."""
    return _CONTROL.sub(_REPLACEMENT, text[:characters])


def plain_line(text: str, characters: int) -> str:
    """Do as `plain_text`, on one line."""
    return _BREAKS.sub(_REPLACEMENT, plain_text(text, characters))
