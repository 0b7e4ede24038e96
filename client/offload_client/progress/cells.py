"""Text as cells of a terminal: how wide it is, cutting it, and making output of programs safe."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Escape sequences of ECMA-48: CSI, OSC and other strings, and two-byte escapes.
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")
_TAB_WIDTH = 8
# Zero-width space, non-joiner, joiner. Terminals do not agree about other format characters.
_JOINERS = "\u200b\u200c\u200d"


@functools.lru_cache(maxsize=4096)
def _character_width(character: str) -> int:
    import unicodedata

    if character == "\ufe0f":
        # Asks for the emoji form of the character before it, which some terminals draw wide.
        return 1
    if unicodedata.category(character) in ("Mn", "Me") or character in _JOINERS:
        return 0
    if unicodedata.east_asian_width(character) in ("W", "F"):
        return 2
    return 1


def text_width(text: str) -> int:
    """Return the cells that a printable text takes, rather too many than too few."""
    if text.isascii():
        return len(text)
    return sum(map(_character_width, text))


def fit(text: str, width: int) -> str:
    """Return as much of a printable text as `width` cells hold."""
    if width <= 0:
        return ""
    if text.isascii():
        return text[:width]
    used = 0
    for index, character in enumerate(text):
        used += _character_width(character)
        if used > width:
            return text[:index]
    return text


def printable(text: str) -> str:
    """Return a text on one line without anything that moves the cursor or changes colours."""
    if text.isascii() and text.isprintable():
        return text
    if "\x1b" in text or "\x9b" in text:
        text = _ESCAPE.sub("", text)
    if "\t" in text:
        text = text.expandtabs(_TAB_WIDTH)
    return _CONTROL.sub("", text)


def visible_line(line: bytes) -> str:
    """Return what a terminal would show of one line of output, as plain text.

    A carriage return starts the line over, as progress bars do: the last part that is not empty
    is what stays.
    """
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    if "\r" in text:
        text = next((part for part in reversed(text.split("\r")) if part.strip()), "")
    return printable(text)


def last_lines(chunks: Iterable[bytes], count: int) -> list[str]:
    """Return the last lines that are not blank.

    Args:
        chunks: pieces of output, the newest first; only as many as needed are read.
        count: most lines wanted.
    """
    data, size = [], 0
    newlines = 0
    for chunk in chunks:
        data.append(chunk)
        size += len(chunk)
        newlines += chunk.count(b"\n")
        # Twice as many, because some may be blank; and a bound for a line without an end.
        if newlines > 2 * count or size > 1 << 16:
            break
    lines = b"".join(reversed(data)).split(b"\n")
    if newlines > 2 * count or size > 1 << 16:
        lines = lines[1:] if len(lines) > 1 else [lines[0][-(1 << 12) :]]
    shown = [text for line in lines[-4 * count :] if (text := visible_line(line)).strip()]
    return shown[-count:] if count > 0 else []
