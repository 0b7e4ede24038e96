"""How long to rest between attempts to reach a session's node."""

from __future__ import annotations

FIRST_SECONDS = 0.2
BRIEF_SECONDS = 0.5
"""At most, when it was reached in between: breaks one after the other make nobody wait for seconds,
and a node that breaks off whatever it has accepted is not flooded."""
LONGEST_SECONDS = 5.0


class BackOff:
    """Rests that double while attempts fail."""

    def __init__(self) -> None:
        self._next = FIRST_SECONDS

    def reached(self) -> None:
        """Hear that the node has answered."""
        self._next = min(self._next, BRIEF_SECONDS)

    def after(self, attempt_seconds: float) -> float:
        """Return for how many seconds to rest after an attempt, or a connection, that took so long.

        What took longer than any rest was rest enough.
        """
        rest = FIRST_SECONDS if attempt_seconds > LONGEST_SECONDS else self._next
        self._next = min(2 * rest, LONGEST_SECONDS)
        return rest
