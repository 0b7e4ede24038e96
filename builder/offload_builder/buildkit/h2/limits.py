"""What a peer may make us do and keep: bounds of one HTTP/2 connection.

BuildKit at its own unix socket is trusted with more than a client out in the world, which could
make us work with frames that cost it nothing. See RFC 9113, section 10.5, and CVE-2019-9512 (PING),
CVE-2019-9515 (SETTINGS), CVE-2019-9518 (empty frames), CVE-2023-44487 (RST_STREAM).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.headers import MAX_HEADER_LIST
from offload_builder.buildkit.h2.messages import RESOURCE_EXHAUSTED, GrpcError

if TYPE_CHECKING:
    from collections.abc import Callable

RECEIVE_WINDOW = 2**20
MAX_STREAMS = 256


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one connection.

    Attributes:
        receive_window: bytes that the peer may send on one stream before we read them.
        max_streams: streams of the peer that may be open at a time.
        max_unread: bytes of all streams that may lie unread before the peer gets no more room.
        max_headers: bytes of one decoded header list.
        max_held_headers: bytes of the header lists of all streams of the peer that are open: a
            block of some hundred bytes can stand for a list of a megabyte.
        policed: frames that cost the peer nothing are counted.
    """

    receive_window: int = RECEIVE_WINDOW
    max_streams: int = MAX_STREAMS
    max_unread: int = MAX_STREAMS * RECEIVE_WINDOW
    max_headers: int = MAX_HEADER_LIST
    max_held_headers: int = MAX_STREAMS * MAX_HEADER_LIST
    policed: bool = False


TRUSTED = ConnectionLimits()


class Budget:
    """Bytes of requests that may be held at a time, as a part of a larger budget or alone."""

    def __init__(self, limit: int, whole: Budget | None = None) -> None:
        self._limit = limit
        self._whole = whole
        self.held = 0

    def take(self, size: int) -> None:
        """Hold some more.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, it is too much.
        """
        if self.held + size > self._limit:
            raise GrpcError(RESOURCE_EXHAUSTED, "too much of requests is being received at once")
        if self._whole is not None:
            self._whole.take(size)
        self.held += size

    def give(self, size: int) -> None:
        """Hold less again."""
        self.held -= size
        if self._whole is not None:
            self._whole.give(size)


class Allowance:
    """A number of things per second, with a reserve for a burst."""

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def spend(self) -> bool:
        """Take one; False when there is none left."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class FloodGuard:
    """Counts the frames of one peer that cost it nothing.

    gRPC in Go answers data with one PING per round trip to measure the line, on one machine some
    thousands in a second; nobody honest sends as many settings, resets or empty frames.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._pings = Allowance(5000, 20_000, clock)
        self._changes = Allowance(200, 2000, clock)

    def see(self, kind: int, flags: int, size: int) -> None:
        """Take note of a frame.

        Raises:
            ProtocolError: ENHANCE_YOUR_CALM, there were too many of this kind.
        """
        if kind == frames.PING:
            allowed = bool(flags & frames.ACK) or self._pings.spend()
        elif kind == frames.DATA:
            allowed = size > 0 or bool(flags & frames.END_STREAM) or self._changes.spend()
        elif kind == frames.WINDOW_UPDATE:
            return
        else:
            allowed = self._changes.spend()
        if not allowed:
            raise frames.ProtocolError(frames.ENHANCE_YOUR_CALM, "too many frames of one kind")
