"""Bytes on their way from one task to another, in as few pieces as that costs nobody time.

A piece that goes over the network costs the same, small or large. While one is sent the next bytes
come, and all of them go together.
"""

from __future__ import annotations

import asyncio
from time import monotonic

FULL_BYTES = 1 << 20
"""Of one piece, and of what waits."""
MANY_BYTES = 16 << 10
"""Who sends as much at once, twice, is copying something: a moment more or less does not matter."""
ENOUGH_BYTES = 256 << 10
MOMENT_SECONDS = 0.001
FEW_BYTES = 4 << 10
"""Of one read: no part of a copy."""
SLOW_RATE = 64 << 20
"""Bytes in a second; with one read in each rest, a socket's buffer mostly carries more."""
REST_SECONDS = 0.002
SLOW_MOMENT_SECONDS = 0.005
LOOK_SECONDS = 0.01
PAUSE_SECONDS = 0.02
PROBE_SECONDS = 0.2
"""After so much time with rests a copy goes on without, to see whether they made it slow."""


class Pace:
    """When a reader reads: at once, but for slow copies, whose bytes gather for a moment.

    Programs write in small blocks, and to carry each of them by itself costs more than the block
    does. Whoever sends little, waits for answers, or sends faster than blocks can be carried, is
    not held up.

    Attributes:
        rests: whether it waits.
    """

    def __init__(self) -> None:
        self.rests = False
        self._size = 0
        self._since = self._at = self._resting_since = 0.0

    async def rest(self) -> None:
        """Wait, perhaps, before the next read."""
        if self.rests:
            await asyncio.sleep(REST_SECONDS)

    def read(self, size: int) -> None:
        """Hear how much a read has found."""
        now = monotonic()
        probe = self.rests and now - self._resting_since >= PROBE_SECONDS
        if probe or size < FEW_BYTES or now - self._at >= PAUSE_SECONDS:
            self.answered()
        if not self._size:
            self._since = now
        self._size += size
        self._at = now
        seconds = now - self._since
        if seconds >= LOOK_SECONDS:
            slow = self._size < SLOW_RATE * seconds
            if slow and not self.rests:
                self._resting_since = now
            self.rests = slow
            self._size = 0

    @property
    def moment(self) -> float:
        """For how many seconds a piece may wait for more."""
        return SLOW_MOMENT_SECONDS if self.rests else MOMENT_SECONDS

    def answered(self) -> None:
        """Hear that the other side has said something: this is no copy."""
        self.rests = False
        self._size = 0


class Gathering:
    """A bounded queue of bytes; one task puts and one takes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._copying = False
        self._changed = asyncio.Event()

    async def put(self, data: bytes, *, most: int = FULL_BYTES) -> None:
        """Add bytes, once fewer than `most` wait."""
        while self._size >= most and not self._ended:
            await self._change()
        self._parts.append(data)
        self._size += len(data)
        self._changed.set()

    def end(self) -> None:
        """Say that nothing more is put."""
        self._ended = True
        self._changed.set()

    async def take(
        self, moment: float = MOMENT_SECONDS, *, enough: int = ENOUGH_BYTES
    ) -> tuple[bytes, ...]:
        """Return what waits, at most `FULL_BYTES` unless more was put at once; none at the end.

        Args:
            moment: seconds that a part of a copy may wait for more.
            enough: bytes that do not wait, for example because no more are put before.
        """
        while not self._parts and not self._ended:
            await self._change()
        many = self._size >= MANY_BYTES
        if self._copying and many and self._size < min(enough, ENOUGH_BYTES) and not self._ended:
            await asyncio.sleep(moment)
        self._copying = many
        count = size = 0
        for part in self._parts:
            size += len(part)
            if count and size > FULL_BYTES:
                break
            count += 1
        taken, self._parts = self._parts[:count], self._parts[count:]
        self._size -= sum(map(len, taken))
        self._changed.set()
        return tuple(taken)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
