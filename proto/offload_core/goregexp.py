r"""Turns the Go regular expressions that moby builds from ignore patterns into Python's.

moby's matcher pastes parts of a pattern into a regular expression without quoting them, so that
Go's own syntax shines through: `\d` is a digit, `[[:alpha:]]` a letter, `\Q` quotes what follows,
and a "*" inside a character class ends that class. The same text means something else to Python,
or nothing. This module reads exactly the constructs that can appear there.
Source: https://github.com/google/re2/wiki/Syntax and the documentation of Go's regexp/syntax.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Ranges = list[tuple[int, int]]
"""Inclusive ranges of code points."""

_LAST = 0x10FFFF
_DIGITS: Ranges = [(0x30, 0x39)]
_UPPER: Ranges = [(0x41, 0x5A)]
_LOWER: Ranges = [(0x61, 0x7A)]
_SPACE: Ranges = [(0x09, 0x0A), (0x0C, 0x0D), (0x20, 0x20)]
_WORD: Ranges = [*_DIGITS, *_UPPER, (0x5F, 0x5F), *_LOWER]
_PERL = {"d": _DIGITS, "s": _SPACE, "w": _WORD}
_POSIX: dict[str, Ranges] = {
    "alnum": [*_DIGITS, *_UPPER, *_LOWER],
    "alpha": [*_UPPER, *_LOWER],
    "ascii": [(0x00, 0x7F)],
    "blank": [(0x09, 0x09), (0x20, 0x20)],
    "cntrl": [(0x00, 0x1F), (0x7F, 0x7F)],
    "digit": _DIGITS,
    "graph": [(0x21, 0x7E)],
    "lower": _LOWER,
    "print": [(0x20, 0x7E)],
    "punct": [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)],
    "space": [(0x09, 0x0D), (0x20, 0x20)],
    "upper": _UPPER,
    "word": _WORD,
    "xdigit": [*_DIGITS, (0x41, 0x46), (0x61, 0x66)],
}
_CONTROL = {"a": 7, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
_ANCHORS = {"A": r"\A", "b": r"\b", "B": r"\B", "z": r"\Z"}
_OCTAL = frozenset("01234567")
_HEX = frozenset("0123456789abcdefABCDEF")
_REPETITION = re.compile(r"\{(0|[1-9][0-9]*)(,(0|[1-9][0-9]*)?)?\}")
_MAX_REPETITIONS = 1000
_STRAY_BYTES = "\ufffd\udc80-\udcff"
"""Go reads a byte that is no UTF-8 as U+FFFD; Python keeps it as one of these surrogates."""


class UnsupportedExpressionError(ValueError):
    """Go would refuse to compile the expression."""


def translate(expression: str) -> str:
    """Return the Python expression, to be compiled with `re.ASCII`.

    Raises:
        UnsupportedExpressionError: Go would refuse it too; says why.
    """
    translated = _Translator(expression).run()
    try:
        re.compile(translated, re.ASCII)
    except re.error as error:
        # What is left are repetitions with nothing before them, or two in a row.
        raise UnsupportedExpressionError(str(error)) from error
    return translated


class _Translator:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def run(self) -> str:
        parts: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "[":
                parts.append(self._class())
            elif char == "\\":
                parts.append(self._escape())
            elif char == "{":
                parts.append(self._repetition())
            else:
                self._at += 1
                parts.append(_outside_class(char))
        return "".join(parts)

    def _escape(self) -> str:
        following = self._text[self._at + 1 : self._at + 2]
        if following == "Q":
            quoted, _, rest = self._text[self._at + 2 :].partition(r"\E")
            self._at = len(self._text) - len(rest)
            return "".join(map(_literal, quoted))
        if following in _ANCHORS:
            self._at += 2
            return _ANCHORS[following]
        ranges = self._named_set()
        if ranges is None:
            return _literal(chr(self._character()))
        return _python_class(ranges)

    def _repetition(self) -> str:
        match = _REPETITION.match(self._text, self._at)
        if match is None:
            self._at += 1
            return r"\{"
        self._at = match.end()
        low = int(match[1])
        high = int(match[3]) if match[3] else low
        if max(low, high) > _MAX_REPETITIONS or high < low:
            raise UnsupportedExpressionError(f"{match[0]} is not a valid repetition")
        return match[0]

    def _class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        ranges: Ranges = []
        first = True
        while first or not self._text.startswith("]", self._at):
            if self._at >= len(self._text):
                raise UnsupportedExpressionError("a [ without its ]")
            first = False
            named = self._posix_set()
            if named is None:
                named = self._named_set()
            ranges += self._range() if named is None else named
        self._at += 1
        return _python_class(ranges, negated=negated)

    def _range(self) -> Ranges:
        start = self._at
        low = high = self._character()
        rest = self._text[self._at : self._at + 2]
        if len(rest) == 2 and rest[0] == "-" and rest[1] != "]":
            self._at += 1
            high = self._character()
            if high < low:
                raise UnsupportedExpressionError(
                    f"the range {self._text[start : self._at]} runs backwards"
                )
        return [(low, high)]

    def _posix_set(self) -> Ranges | None:
        if not self._text.startswith("[:", self._at):
            return None
        end = self._text.find(":]", self._at + 2)
        if end < 0:
            return None
        name = self._text[self._at + 2 : end]
        ranges = _POSIX.get(name.removeprefix("^"))
        if ranges is None:
            raise UnsupportedExpressionError(f"there is no character class [:{name}:]")
        self._at = end + 2
        return _complement(ranges) if name.startswith("^") else ranges

    def _named_set(self) -> Ranges | None:
        if self._text[self._at] != "\\":
            return None
        name = self._text[self._at + 1 : self._at + 2]
        ranges = _PERL.get(name.lower()) if name else None
        if ranges is not None:
            self._at += 2
            return _complement(ranges) if name.isupper() else ranges
        if name in {"p", "P"} and self._at + 2 < len(self._text):
            ranges = _unicode_category(self._text[self._at + 2])
            self._at += 3
            return _complement(ranges) if name == "P" else ranges
        return None

    def _character(self) -> int:
        """Read one character of a class, or an escaped one anywhere."""
        if self._at >= len(self._text):
            raise UnsupportedExpressionError("a [ without its ]")
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ord(char)
        if self._at >= len(self._text):
            raise UnsupportedExpressionError("a \\ at the end")
        char = self._text[self._at]
        self._at += 1
        if char.isascii() and not char.isalnum():
            return ord(char)
        if char in _CONTROL:
            return _CONTROL[char]
        if char == "0" or (char in _OCTAL and self._text[self._at : self._at + 1] in _OCTAL):
            digits = char
            while len(digits) < 3 and self._text[self._at : self._at + 1] in _OCTAL:
                digits += self._text[self._at]
                self._at += 1
            return int(digits, 8)
        pair = self._text[self._at : self._at + 2]
        if char == "x" and len(pair) == 2 and _HEX.issuperset(pair):
            self._at += 2
            return int(pair, 16)
        raise UnsupportedExpressionError(f"\\{char} is not a known escape")


def _outside_class(char: str) -> str:
    if char == "^":
        # In a group, because Python repeats no bare anchor.
        return r"(?:\A)"
    if char == "$":
        return r"\Z"
    if char in "().*?|":
        # Only "|" can come from a pattern, the others are moby's; all mean the same to Python.
        return char
    return _literal(char)


def _literal(char: str) -> str:
    if char == "\ufffd" or "\udc80" <= char <= "\udcff":
        return f"[{_STRAY_BYTES}]"
    return re.escape(char)


def _python_class(ranges: Iterable[tuple[int, int]], *, negated: bool = False) -> str:
    if negated and list(ranges) == [(0x2F, 0x2F)]:
        # Python has a faster loop for this one, which every "*" and "?" becomes.
        return "[^/]"
    inner = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
    if not inner:
        return r"[\x00-\U0010ffff]" if negated else "(?!)"
    return f"[{'^' if negated else ''}{inner}]"


def _complement(ranges: Ranges) -> Ranges:
    outside: Ranges = []
    following = 0
    for low, high in sorted(ranges):
        if low > following:
            outside.append((following, low - 1))
        following = max(following, high + 1)
    if following <= _LAST:
        outside.append((following, _LAST))
    return outside


@functools.cache
def _unicode_category(name: str) -> Ranges:
    if name not in "CLMNPSZ":
        raise UnsupportedExpressionError(f"there is no Unicode class \\p{name}")
    import unicodedata

    ranges: Ranges = []
    for point in range(_LAST + 1):
        if unicodedata.category(chr(point))[0] != name:
            continue
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = (ranges[-1][0], point)
        else:
            ranges.append((point, point))
    return ranges
