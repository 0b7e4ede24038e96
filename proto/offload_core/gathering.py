"""Bytes on their way from one task to another, in as few pieces as that costs nobody time.

A piece that goes over the network costs the same, small or large. While one is sent the next bytes
come, and all of them go together.
"""

from __future__ import annotations

import asyncio

FULL_BYTES = 1 << 20
"""Of one piece, and of what waits."""
MANY_BYTES = 16 << 10
"""Who sends as much at once, twice, is copying something: a moment more or less does not matter."""
ENOUGH_BYTES = 256 << 10
MOMENT_SECONDS = 0.001


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

    async def take(self) -> bytes:
        """Return what waits, at most `FULL_BYTES` unless more was put at once; none at the end."""
        while not self._parts and not self._ended:
            await self._change()
        many = self._size >= MANY_BYTES
        if self._copying and many and self._size < ENOUGH_BYTES and not self._ended:
            await asyncio.sleep(MOMENT_SECONDS)
        self._copying = many
        count = size = 0
        for part in self._parts:
            size += len(part)
            if count and size > FULL_BYTES:
                break
            count += 1
        taken, self._parts = self._parts[:count], self._parts[count:]
        data = taken[0] if count == 1 else b"".join(taken)
        self._size -= len(data)
        self._changed.set()
        return data

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
