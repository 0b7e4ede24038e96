"""How a build goes on whose connection broke: again, soon, and not for ever."""

from __future__ import annotations

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before each attempt in a row that brings nothing new to the node."""


class Resume:
    """Counts the attempts of one build."""

    def __init__(self) -> None:
        self._in_vain = 0
        self.begun = False
        """An attempt was lost, and another one followed."""

    def next_pause(self, *, progressed: bool) -> float | None:
        """Return the seconds to wait before the next attempt; None to give up.

        What a node has got it keeps, so each attempt that made progress leaves less to do.

        Args:
            progressed: the node acknowledged content in the attempt that has just failed.
        """
        if progressed:
            self._in_vain = 0
        if self._in_vain == len(PAUSES_SECONDS):
            return None
        self._in_vain += 1
        self.begun = True
        return PAUSES_SECONDS[self._in_vain - 1]
