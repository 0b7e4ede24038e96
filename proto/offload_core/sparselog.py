"""Log lines that others can cause at will: so many of each event, and then their number."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PER_MINUTE = 30
"""Lines of one event."""
_MINUTE = 60.0


class SparseLog:
    """A logger that writes at most `PER_MINUTE` lines of each event.

    The next line after some that were left out says how many, as `left_out`.

    Args:
        log: writes the lines.
        clock: seconds that never go back.
    """

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._minutes: dict[str, tuple[float, int]] = {}
        """By event: when its minute began, and how many there were since. Events are few: their
        names are those in the program."""

    def info(self, event: str, **values: object) -> None:
        """Log what happens."""
        self._write("info", event, values)

    def warning(self, event: str, **values: object) -> None:
        """Log what somebody should look at."""
        self._write("warning", event, values)

    def error(self, event: str, **values: object) -> None:
        """Log what is wrong with the program."""
        self._write("error", event, values)

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        now = self._clock()
        began, count = self._minutes.get(event, (now, 0))
        if now - began >= _MINUTE:
            if count > PER_MINUTE:
                values["left_out"] = count - PER_MINUTE
            began, count = now, 0
        self._minutes[event] = began, count + 1
        if count < PER_MINUTE:
            getattr(self._log, level)(event, **values)
