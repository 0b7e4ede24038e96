"""Output of steps, which comes in pieces of any size, as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def split_lines(data: bytes) -> list[bytes]:
    """Split after each newline, and only there: a carriage return is part of the line."""
    if b"\r" not in data:
        return data.splitlines(keepends=True)
    pieces = [piece + b"\n" for piece in data.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return pieces if pieces[-1] else pieces[:-1]


def prefix_lines(prefix: bytes, lines: bytes) -> bytes:
    """Return whole lines, each with a prefix; only a newline ends a line."""
    return prefix + lines[:-1].replace(b"\n", b"\n" + prefix) + b"\n"


def final_lines(lines: bytes, count: int) -> list[bytes]:
    """Return the last `count` of whole lines with their ends."""
    return [line + b"\n" for line in lines[:-1].rsplit(b"\n", count)[-count:]]


def log_stamp(offset_seconds: float) -> bytes:
    """Return the time that stands before a log line, with its space: three to four digits."""
    if offset_seconds < 10:
        return b"%.3f " % offset_seconds
    return (b"%.2f " if offset_seconds < 100 else b"%.1f ") % offset_seconds


def stamped_lines(log: Iterable[tuple[float, bytes]]) -> list[bytes]:
    """Return pieces of output as lines without their ends, each after the time of its begin.

    Args:
        log: seconds after the step's start, and bytes.
    """
    lines: list[bytes] = []
    line = b""
    for offset, data in log:
        for piece in split_lines(data):
            line = line + piece if line else log_stamp(offset) + piece
            if piece.endswith(b"\n"):
                lines.append(line[:-1])
                line = b""
    if line:
        lines.append(line)
    return lines


def whole_characters(line: bytearray) -> int:
    """Return how many bytes of a line are whole UTF-8 characters, as far as one can know."""
    size = len(line)
    for back in range(1, min(4, size + 1)):
        byte = line[size - back]
        if byte < 0x80:
            return size
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return size - back if needed > back else size
    return size
