"""Matches paths against ignore and include patterns exactly as BuildKit does.

BuildKit uses the Go package moby/patternmatcher. Its rules, all of which builds depend on:

- A pattern that starts with "!" is an exception; the last pattern that matches decides.
- A pattern that matches a directory also matches everything below it.
- "*" and "?" stay within one path element, "**" crosses any number of them.
- A pattern that starts with "**" and has no other special character is a test of the literal
  end: `**b` matches `x/ab`. One whose only special characters are a final "**" is a test of the
  literal beginning.
- Everything else becomes a Go regular expression, into which classes and escapes are copied.

While a tree is walked, moby remembers per pattern whether it matched the parent, and skips
patterns that cannot change the verdict any more, parents included; `match_child` does the same,
and so can differ from `matches` where an exception names a parent of an earlier pattern.

Neighbouring patterns of one sign decide together, so they are merged: literal ones into sets and
the others into one regular expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_core.errors import ContextError
from offload_core.goglob import clean_path, is_accepted, trim_space
from offload_core.goregexp import UnsupportedExpressionError, translate

if TYPE_CHECKING:
    from collections.abc import Iterable

_QUOTED = frozenset(".+()$")
"""Characters that moby quotes. It means to quote "|", "{" and "}" as well, but its table has no
room for them; so "a|b*" has two alternatives and "a{2}*" a repetition."""
_PATTERN_CHARS = frozenset("*[]?^\\")
"""fsutil's patternChars: with one of them a pattern is more than a plain path."""
_UNANCHORING = frozenset("|{")
"""In an expression these can undo the "/" before them, or the anchor at its start."""

_TAILLESS = "*[]?^|{}"
"""Characters of a pattern that are, or may be, more than themselves in its expression."""

_ANY_ELEMENT = re.compile(".*", re.DOTALL)

_Shape = list["re.Pattern[str] | str | None"]
"""Tests of path elements; None stands for any further elements."""


class PatternMatcher:
    """Patterns, compiled; immutable, so that threads can share it."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Compile patterns.

        Args:
            patterns: in order, as the ignore file reader gives them or as BuildKit sends them.

        Raises:
            ContextError: a pattern is malformed; names it.
        """
        compiled = [pattern for text in patterns if (pattern := _parse(text)) is not None]
        self._runs = tuple(_merge(compiled))
        self._reach = {sign: _Reach(compiled, sign) for sign in (False, True)}

    def matches(self, path: str) -> bool:
        """Return whether the patterns match the path or, through a parent directory, cover it.

        Raises:
            ContextError: a pattern that had to be tried has a regular expression that Go refuses.
        """
        tried = [path]
        tried += [path[:end] for end, char in enumerate(path) if char == "/" and end]
        matched = False
        for run in self._runs:
            if run.exception == matched and any(map(run.matches, tried)):
                matched = not run.exception
        return matched

    def match_child(self, path: str, parent_state: int = 0) -> tuple[bool, int]:
        """Return the verdict on a path, and its state for the entries below it.

        Args:
            path: relative path of the entry.
            parent_state: state of the directory that holds it; 0 at the top.

        Raises:
            ContextError: as `matches`.
        """
        matched = False
        state = 0
        bit = 1
        for run in self._runs:
            exception = run.exception
            if parent_state & bit or (exception == matched and run.matches(path)):
                state |= bit
                matched = not exception
            bit <<= 1
        return matched, state

    def prunable(self, directory: str, matched: bool) -> bool:
        """Return whether everything below a directory certainly has the directory's own verdict.

        fsutil has a shortcut for when only plain paths, with or without a final "/*" or "/**",
        could turn the verdict. It is followed to the letter even where it overlooks matches
        (`x/*/**` reaches nothing, `a|b/*` is taken for a path), as it decides what BuildKit sees.
        """
        return not self._reach[matched].below(directory)


@dataclass(slots=True)
class _Pattern:
    text: str
    exception: bool


@dataclass(slots=True)
class _Run:
    """Neighbouring patterns of one sign; any of them that matches decides for all."""

    exception: bool
    paths: set[str] = field(default_factory=set)
    beginnings: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    expressions: list[str] = field(default_factory=list)
    broken: tuple[str, str] | None = None
    regexp: re.Pattern[str] | None = None
    anywhere: re.Pattern[str] | None = None
    tails: tuple[str, ...] = ()
    """One of them is the end of every path that `regexp` matches; "" when nothing is known."""

    def matches(self, path: str) -> bool:
        if path in self.paths:
            return True
        if self.endings and path.endswith(self.endings):
            return True
        if self.beginnings and path.startswith(self.beginnings):
            return True
        if (
            self.regexp is not None
            and path.endswith(self.tails)
            and self.regexp.match(path) is not None
        ):
            return True
        if self.anywhere is not None and self.anywhere.search(path) is not None:
            return True
        if self.broken is not None:
            # moby fails when it comes to such a pattern, and only then.
            raise _malformed(*self.broken)
        return False

    def add(self, text: str, kind: str, expression: str) -> None:
        if kind == "path":
            self.paths.add(text)
        elif kind == "beginning":
            self.beginnings += (text[:-2],)
        elif kind == "ending":
            self.endings += (text[2:],)
            if text.startswith("**/"):
                self.paths.add(text[3:])
        else:
            self.expressions.append(expression)
            self.tails += (_literal_tail(text),)

    def finish(self) -> None:
        # These may have lost the anchor at their start. Searching is slow, and they are rare.
        loose = [text for text in self.expressions if not _UNANCHORING.isdisjoint(text)]
        self.anywhere = _one_of(loose)
        self.regexp = _one_of([text for text in self.expressions if text not in loose])


def _literal_tail(pattern: str) -> str:
    """Return the end that a path must have to match: what follows the last special character."""
    if "\\" in pattern:
        # What it takes with it can be long.
        return ""
    at = max(pattern.rfind(char) for char in _TAILLESS)
    tail = pattern[at + 1 :]
    if pattern[at] == "*":
        # "**/" also stands for nothing.
        tail = tail.removeprefix("/")
    # Other characters can stand for bytes that are no UTF-8.
    return tail if tail.isascii() else ""


def _one_of(expressions: list[str]) -> re.Pattern[str] | None:
    if not expressions:
        return None
    return re.compile("|".join(f"(?:{expression})" for expression in expressions), re.ASCII)


def _parse(text: str) -> _Pattern | None:
    text = trim_space(text)
    if not text:
        return None
    # Cleaned with the "!", as moby does: "!a/../b" is the pattern "b".
    given, text = text, clean_path(text)
    exception = text.startswith("!")
    if exception:
        text = text[1:]
    if not text:
        raise ContextError('the pattern "!" names nothing; write what it is an exception for')
    if not is_accepted(text):
        raise _malformed(given, "a [ without its ], an empty [], or a \\ at the end")
    return _Pattern(text, exception)


def _malformed(pattern: str, why: str) -> ContextError:
    return ContextError(
        f'the pattern "{pattern}" is malformed: {why}',
        hint="correct it in .dockerignore or in the COPY or ADD instruction that has it",
    )


def _merge(patterns: list[_Pattern]) -> list[_Run]:
    runs: list[_Run] = []
    for pattern in patterns:
        kind, expression = _compile(pattern.text)
        if kind == "regexp":
            try:
                expression = translate(expression)
            except UnsupportedExpressionError as error:
                # On its own, so that the patterns before it are tried on all parents first.
                runs.append(_Run(pattern.exception, broken=(pattern.text, str(error))))
                continue
        if not runs or runs[-1].exception != pattern.exception or runs[-1].broken:
            runs.append(_Run(pattern.exception))
        runs[-1].add(pattern.text, kind, expression)
    for run in runs:
        run.finish()
    return runs


def _compile(pattern: str) -> tuple[str, str]:
    """Return how a pattern is tested: "path", "beginning", "ending" or "regexp", and that regexp.

    Follows moby's compile step, which decides the kind while it reads the pattern once.
    """
    kind = "path"
    parts = ["^"]
    # Go's scanner drops a byte order mark, but only from the expression.
    chars = pattern.removeprefix("\ufeff")
    at = 0
    first = True
    while at < len(chars):
        char = chars[at]
        at += 1
        if char == "*" and chars.startswith("*", at):
            at += 1
            at += chars.startswith("/", at)
            if at < len(chars):
                parts.append("(.*/)?")
                kind = "regexp"
            elif kind == "path":
                kind = "beginning"
            else:
                parts.append(".*")
                kind = "regexp"
            if first:
                kind = "ending"
        elif char in "*?":
            parts.append("[^/]*" if char == "*" else "[^/]")
            kind = "regexp"
        elif char == "\\":
            parts.append(char + chars[at : at + 1])
            at += 1
            kind = "regexp"
        else:
            parts.append("\\" + char if char in _QUOTED else char)
            if char in "[]":
                kind = "regexp"
        first = False
    parts.append("$")
    return kind, "".join(parts)


class _Reach:
    """Which directories hold something that a pattern of one sign could match."""

    def __init__(self, patterns: list[_Pattern], exception: bool) -> None:
        texts = [pattern.text for pattern in patterns if pattern.exception == exception]
        plain = all(_PATTERN_CHARS.isdisjoint(_without_final_glob(text)) for text in texts)
        self._shapes = [_plain_shape(text) if plain else _shape(text) for text in texts]

    def below(self, directory: str) -> bool:
        """Return whether one of the patterns could match an entry below the directory."""
        if not self._shapes:
            return False
        elements = directory.split("/")
        return any(_reaches(shape, elements) for shape in self._shapes)


def _without_final_glob(text: str) -> str:
    return text.removesuffix("/**").removesuffix("/*")


def _plain_shape(text: str) -> _Shape:
    beginning = _without_final_glob(text)
    shape: _Shape = [*beginning.split("/")]
    return shape if beginning == text else [*shape, _ANY_ELEMENT]


def _shape(text: str) -> _Shape:
    kind = _compile(text)[0]
    if kind == "path":
        return [*text.split("/")]
    if not _UNANCHORING.isdisjoint(text):
        return [None]
    shape: _Shape = []
    for element in text.split("/"):
        special = _PATTERN_CHARS.intersection(element)
        if not special:
            shape.append(element)
        elif special <= {"*", "?"} and "**" not in element:
            shape.append(re.compile(_element_expression(element), re.DOTALL))
        else:
            # A class may match "/", so that nothing can be said about elements any more.
            shape.append(None)
            break
    return shape


def _element_expression(element: str) -> str:
    wild = {"*": ".*", "?": "."}
    return "".join(wild.get(char) or re.escape(char) for char in element)


def _reaches(shape: _Shape, elements: list[str]) -> bool:
    for test, element in zip(shape, elements, strict=False):
        if test is None:
            return True
        if isinstance(test, str):
            if test != element:
                return False
        elif test.fullmatch(element) is None:
            return False
    return len(shape) > len(elements)
