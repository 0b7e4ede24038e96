"""How many bytes are on their way between members and their sessions, and how many more may be."""

from __future__ import annotations

MAX_PIECE = 1 << 20
"""Bytes that one call takes at once. Large pieces are what makes streams fast."""
MIN_PIECE = 64 << 10
_PARTS = 8
"""A call takes this part of what is free, so that others find something too."""


class Room:
    """Memory for bytes on their way.

    Nobody waits for room, for whoever has it may never let go of it: where little is left, pieces
    are small.

    Args:
        size: bytes; with small pieces of many calls there may be somewhat more.
        around: the room that this one is a part of.
    """

    def __init__(self, size: int, around: Room | None = None) -> None:
        self._size = size
        self._around = around
        self.held = 0

    def piece(self) -> int:
        """Return how many bytes a call may take now."""
        own = min(MAX_PIECE, max(MIN_PIECE, (self._size - self.held) // _PARTS))
        return own if self._around is None else min(own, self._around.piece())

    def take(self, size: int) -> None:
        """Have so many more bytes on their way; fewer when it is negative."""
        self.held += size
        if self._around is not None:
            self._around.take(size)
