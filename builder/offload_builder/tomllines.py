"""In which line of a TOML file something stands, for sentences about it."""

from __future__ import annotations

import re

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"\s*((?:\"[^\"]*\"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:\"[^\"]*\"|'[^']*'|[A-Za-z0-9_-]+))*)\s*="
)
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")
_QUOTES = re.compile(r'"""|\'\'\'')

Place = tuple["str | int", ...]
"""Keys from the top; the number of an element of an array of tables, from 0."""


class TomlLines:
    """The lines of the tables and keys of one file, which is valid TOML."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Place, int] = {}
        counts: dict[str, int] = {}
        table: Place = ()
        inside = ""
        for number, line in enumerate(text.splitlines(), start=1):
            if inside:
                inside = _after(line, inside)
                continue
            if header := _HEADER.match(line):
                parts = _parts(header[2])
                if header[1] == "[[":
                    name = ".".join(parts)
                    index = counts[name] = counts.get(name, -1) + 1
                    table = (*parts, index)
                else:
                    first = parts[0] if parts else ""
                    # A table below an element of an array belongs to the last element.
                    table = (first, counts[first], *parts[1:]) if first in counts else parts
                self._lines.setdefault(table, number)
            elif key := _KEY.match(line):
                parts = _parts(key[1])
                for size in range(1, len(parts) + 1):
                    self._lines.setdefault((*table, *parts[:size]), number)
            inside = _after(line, "")

    def of(self, *place: str | int) -> int:
        """Return the line of a place, else of what it stands in; 1 at the top."""
        for size in range(len(place), 0, -1):
            if place[:size] in self._lines:
                return self._lines[place[:size]]
        return 1


def _parts(text: str) -> tuple[str, ...]:
    return tuple(one or two or three for one, two, three in _PART.findall(text))


def _after(line: str, inside: str) -> str:
    """Return the quotes of the text over several lines that is open at the end of a line."""
    for quotes in _QUOTES.findall(line):
        if not inside:
            inside = quotes
        elif quotes == inside:
            inside = ""
    return inside
