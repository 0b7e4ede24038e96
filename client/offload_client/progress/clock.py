"""Times of the wire as whole nanoseconds, and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

NANOSECONDS = 1_000_000_000


def nanoseconds(timestamp: Timestamp) -> int:
    """Return a wire timestamp as nanoseconds since 1970; 0 when it is unset."""
    return timestamp.seconds * NANOSECONDS + timestamp.nanos


class LocalClock:
    """Wall time of this machine that never goes backwards."""

    def __init__(self) -> None:
        self._base_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        """Return nanoseconds since 1970."""
        return self._base_ns + time.monotonic_ns()


_DATE_CACHE: dict[int, str] = {}


def rfc3339_nano(moment_ns: int) -> str:
    """Return a time as Go's time.RFC3339Nano in UTC: no trailing zeros in the fraction."""
    seconds, rest = divmod(moment_ns, NANOSECONDS)
    date = _DATE_CACHE.get(seconds)
    if date is None:
        if len(_DATE_CACHE) > 1000:
            _DATE_CACHE.clear()
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        _DATE_CACHE[seconds] = date
    if rest == 0:
        return date + "Z"
    return f"{date}.{rest:09d}".rstrip("0") + "Z"
