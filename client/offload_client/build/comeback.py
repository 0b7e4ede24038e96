"""Patience with a connection that broke: how long, and how often one knocks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "OFFLOAD_RECONNECT_SECONDS"
COME_BACK_SECONDS = 300.0
"""A laptop finds its network again, a relay restarts."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0


class Comeback:
    """The attempts to return after one loss.

    The clock stands still while the machine sleeps, so a lid that closes again costs nothing.
    """

    def __init__(self, patience_seconds: float | None = None) -> None:
        """Begin to wait.

        Args:
            patience_seconds: `COME_BACK_SECONDS` when None.
        """
        patience = COME_BACK_SECONDS if patience_seconds is None else patience_seconds
        self._until = time.monotonic() + patience
        self._pause = FIRST_PAUSE_SECONDS

    def next_pause(self) -> float | None:
        """Return the seconds to wait before the next attempt; None to give up."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return pause if time.monotonic() + pause < self._until else None


def patience_of(environment: Mapping[str, str]) -> float:
    """Return for how many seconds a command tries to come back.

    Raises:
        ConfigError: the variable is no number of seconds.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return COME_BACK_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f'{VARIABLE} is "{text}"; write a number of seconds, for example 300')
    return seconds
