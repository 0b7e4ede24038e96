"""How a build goes on whose connection broke: again, soon, and not for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "OFFLOAD_REPEATS"
REPEATS = 2
"""How often a build is repeated whose commands had begun when its node was lost. A command that
kills nodes must not kill all of them."""

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before each attempt in a row that brings nothing new to the node."""


class Resume:
    """Counts the attempts of one build.

    Args:
        repeats: how often it may be repeated after commands had begun.
    """

    def __init__(self, repeats: int = REPEATS) -> None:
        self.repeats = repeats
        self.repeated = 0
        """How often it was repeated after commands had begun."""
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

    @property
    def given_up(self) -> str:
        """What to do when it may not be repeated, in words."""
        if not self.repeated:
            return "run it again"
        times = "once" if self.repeated == 1 else f"{self.repeated} times"
        return f"it was repeated {times} and lost again; run it again"

    @property
    def may_repeat(self) -> bool:
        """Whether the build may be repeated once more."""
        return self.repeated < self.repeats


def repeats_of(environment: Mapping[str, str]) -> int:
    """Return how often a build may be repeated.

    Raises:
        ConfigError: the variable is no such number.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return REPEATS
    if not (text.isascii() and text.isdecimal()) or int(text) > 100:
        raise ConfigError(f'{VARIABLE} is "{text}"; write a number, 0 to repeat nothing')
    return int(text)
