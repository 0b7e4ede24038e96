"""docker's table form: upper-case headings, three spaces between columns, no lines."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_core.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.timestamp_pb2 import Timestamp


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, without spaces at line ends."""
    widths = [max(len(row[index]) for row in (headings, *rows)) for index in range(len(headings))]
    lines = (
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    )
    return "\n".join(lines)


def ago(stamp: Timestamp) -> str:
    """Return "12 seconds ago" and the like; "-" for a moment that is not set."""
    if not stamp.seconds:
        return "-"
    seconds = max(0, int(datetime.now(UTC).timestamp() - stamp.seconds))
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def between(start: Timestamp, end: Timestamp) -> str:
    """Return the time from one moment to another, or to now; "-" when it has not begun."""
    if not start.seconds:
        return "-"
    last = end.seconds + end.nanos / 1e9 if end.seconds else datetime.now(UTC).timestamp()
    return format_duration(max(0.0, last - start.seconds - start.nanos / 1e9))


def moment(seconds: float) -> str:
    """Return seconds since 1970 as RFC 3339, UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def rfc3339(stamp: Timestamp) -> str | None:
    """Return a moment for JSON; None when it is not set."""
    if not stamp.seconds:
        return None
    return moment(stamp.seconds)
