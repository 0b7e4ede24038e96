"""Go's `filepath.Clean` and `filepath.Match` on slash-separated paths.

Ignore patterns are defined in terms of these two functions, and Python's neighbours differ:
`posixpath.normpath` keeps a leading "//", `fnmatch` lets "*" cross "/" and knows no escapes.
Source: the documentation of Go's path/filepath and strings packages.
"""

from __future__ import annotations

import functools
import re

_GO_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What Go's unicode.IsSpace accepts; `str.strip()` would also take the separators 0x1c-0x1f."""

_RANGE_END = r"(?:\\.|[^\\\-\]])"
_CLASS = rf"\[\^?+(?:{_RANGE_END}(?:-{_RANGE_END})?)+\]"
_WELL_FORMED = re.compile(rf"(?:{_CLASS}|\\.|[^\\\[])*+", re.DOTALL)
_TERM = re.compile(rf"(?P<class>{_CLASS})|\\(?P<escaped>.)|(?P<plain>.)", re.DOTALL)
_CLASS_RANGE = re.compile(rf"({_RANGE_END})(?:-({_RANGE_END}))?", re.DOTALL)


def trim_space(text: str) -> str:
    """Return `text` without the white space, in Go's sense, around it."""
    return text.strip(_GO_SPACE)


def clean_path(path: str) -> str:
    """Return the shortest equivalent of a path; "." for the empty path."""
    rooted = path.startswith("/")
    parts: list[str] = []
    for part in path.split("/"):
        if part in {"", "."}:
            continue
        if part != "..":
            parts.append(part)
        elif parts and parts[-1] != "..":
            parts.pop()
        elif not rooted:
            parts.append(part)
    cleaned = "/".join(parts)
    if rooted:
        return "/" + cleaned
    return cleaned or "."


def join_path(*parts: str) -> str:
    """Join path elements and clean the result; empty elements are ignored."""
    given = [part for part in parts if part]
    return clean_path("/".join(given)) if given else ""


def is_accepted(pattern: str) -> bool:
    """Return whether `filepath.Match(pattern, ".")` reports no error.

    This is moby's check of a pattern. Go looks only as far as the name "." leads it: a malformed
    end is not noticed after a beginning that cannot match.
    """
    name = "."
    while pattern:
        star, chunk, pattern = _next_chunk(pattern)
        if star and not chunk:
            return True
        if _WELL_FORMED.fullmatch(chunk) is None:
            return False
        length = _matched_length(chunk, name)
        if length is None or (not pattern and length < len(name)):
            # A star may stand for the name, which leaves nothing to this chunk.
            if not star or not name or _matched_length(chunk, "") is None:
                return True
            length = len(name)
        name = name[length:]
    return True


def _next_chunk(pattern: str) -> tuple[bool, str, str]:
    """Split off the part up to the next star: was there one before it, the part, the rest."""
    stripped = pattern.lstrip("*")
    inside_class = False
    at = 0
    while at < len(stripped):
        char = stripped[at]
        if char == "\\":
            at += 1
        elif char == "*" and not inside_class:
            break
        elif char in "[]":
            inside_class = char == "["
        at += 1
    return len(stripped) < len(pattern), stripped[:at], stripped[at:]


def _matched_length(chunk: str, name: str) -> int | None:
    """Return how much of the name, "." or nothing, a part without stars matches; None: nothing."""
    if not chunk:
        return 0
    expression = _compile(chunk)
    return len(name) if name and expression and expression.fullmatch(name) else None


def match_name(pattern: str, name: str) -> bool:
    """Return whether the name matches the whole pattern; a malformed pattern matches nothing."""
    expression = _compile(pattern)
    return expression is not None and expression.fullmatch(name) is not None


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str] | None:
    if _WELL_FORMED.fullmatch(pattern) is None:
        return None
    parts: list[str] = []
    for term in _TERM.finditer(pattern):
        if term["class"]:
            parts.append(_class_expression(term["class"]))
        elif term["escaped"]:
            parts.append(re.escape(term["escaped"]))
        elif term["plain"] == "*":
            parts.append("[^/]*")
        elif term["plain"] == "?":
            parts.append("[^/]")
        else:
            parts.append(re.escape(term["plain"]))
    return re.compile("".join(parts), re.DOTALL)


def _class_expression(text: str) -> str:
    negated = text[1] == "^"
    ranges: list[str] = []
    for match in _CLASS_RANGE.finditer(text, 2 if negated else 1, len(text) - 1):
        low = match[1][-1]
        high = match[2][-1] if match[2] else low
        if low <= high:
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
    if not ranges:
        # Every range is upside down: nothing is inside, everything is outside.
        return "." if negated else r"(?!)"
    return f"[{'^' if negated else ''}{''.join(ranges)}]"
