"""Reads .dockerignore files as BuildKit does.

Source: moby/patternmatcher's ignorefile package, and BuildKit's frontend/dockerui, which prefers
an ignore file that is named after the Dockerfile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.errors import ContextError
from offload_core.goglob import clean_path, trim_space

if TYPE_CHECKING:
    from pathlib import Path

IGNORE_FILE = ".dockerignore"
_MAX_LINE_BYTES = 64 * 1024
"""Size of the buffer of Go's bufio.Scanner; a line that fills it is refused."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The ignore patterns of a build.

    Attributes:
        patterns: in the form that `PatternMatcher` takes; empty for no rules.
        source: file that they come from; None when there is no ignore file.
    """

    patterns: list[str]
    source: Path | None


def find_ignore_rules(root: Path, dockerfile: Path) -> IgnoreRules:
    """Read the ignore file that BuildKit would use.

    Args:
        root: directory of the build context.
        dockerfile: the Dockerfile; `<dockerfile>.dockerignore` beside it wins, even when empty.

    Raises:
        ContextError: the file exists but cannot be read, or has too long a line.
    """
    for path in (dockerfile.with_name(dockerfile.name + IGNORE_FILE), root / IGNORE_FILE):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ContextError(f"cannot read {path}: {error.strerror}") from error
        return IgnoreRules(parse_ignore_file(data, name=str(path)), path)
    return IgnoreRules([], None)


def parse_ignore_file(data: bytes, *, name: str = IGNORE_FILE) -> list[str]:
    """Return the patterns of an ignore file in order; "!" marks an exception.

    Bytes that are no UTF-8 become lone surrogates, as in file names that Python lists.

    Args:
        data: content of the file.
        name: how errors call it.

    Raises:
        ContextError: a line has 64 KiB or more.
    """
    patterns: list[str] = []
    for number, raw in enumerate(data.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        length = len(raw) + (len(_BYTE_ORDER_MARK) if number == 1 and _has_mark(data) else 0)
        if length >= _MAX_LINE_BYTES:
            raise ContextError(
                f"line {number} of {name} is too long: {length} bytes, "
                f"at most {_MAX_LINE_BYTES - 1} are read"
            )
        pattern = _parse_line(raw.decode(errors="surrogateescape"))
        if pattern is not None:
            patterns.append(pattern)
    return patterns


def _has_mark(data: bytes) -> bool:
    return data.startswith(_BYTE_ORDER_MARK)


def _parse_line(line: str) -> str | None:
    # A comment has its "#" in the first column; after white space it is part of a pattern.
    if line.startswith("#"):
        return None
    pattern = trim_space(line)
    if not pattern:
        return None
    inverted = pattern.startswith("!")
    if inverted:
        pattern = trim_space(pattern[1:])
    if pattern:
        pattern = clean_path(pattern)
        if len(pattern) > 1:
            pattern = pattern.removeprefix("/")
    return "!" + pattern if inverted else pattern
