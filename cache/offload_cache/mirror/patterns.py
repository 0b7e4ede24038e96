"""Patterns for names of repositories and projects, as administrators write them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PIECE = re.compile(r"\*\*|\*|\?")
_MEANING = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
EVERYTHING = "**"


def matches(patterns: Iterable[str], name: str) -> bool:
    """Return whether a name fits one of the patterns.

    `*` and `?` stand for anything but a slash, `**` for anything at all; all else is itself.
    """
    return any(_compiled(pattern).fullmatch(name) is not None for pattern in patterns)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts, position = [], 0
    for piece in _PIECE.finditer(pattern):
        parts += [re.escape(pattern[position : piece.start()]), _MEANING[piece[0]]]
        position = piece.end()
    return re.compile("".join([*parts, re.escape(pattern[position:])]), re.DOTALL)
