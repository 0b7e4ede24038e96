"""When a session is paused, removed or ended, and what is said before: a clock and nothing else.

Times are seconds of any clock that only goes on, the caller's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_core.units import format_duration

if TYPE_CHECKING:
    from offload_builder.node.sessions.limits import GivenLimits

END_WARNINGS = (300.0, 60.0)
"""Seconds before the end of a session's time at which its people are told."""
PAUSE_WARNING = 60.0


class Due(enum.Enum):
    """What has to happen to a session now."""

    PAUSE = "pause"
    """It was not used for its idle timeout."""
    REMOVE = "remove"
    """It was paused, and nobody came back."""
    END = "end"
    """Its time is over."""


@dataclass
class Lifetime:
    """One session from when it is ready.

    Attributes:
        limits: its times.
        ready_at: when its engine answered first.
        in_use: something runs or is open in it.
        paused_at: since when it is paused; None while it is not.
    """

    limits: GivenLimits
    ready_at: float
    in_use: bool = False
    paused_at: float | None = None
    _used_at: float = 0.0
    _paused_before: float = 0.0
    _said: set[float] = field(default_factory=set)
    _pause_said: bool = False

    def __post_init__(self) -> None:
        self._used_at = self.ready_at

    def touch(self, now: float) -> None:
        """Hear that it was used just now."""
        self._used_at, self._pause_said = now, False

    def use(self, now: float, *, in_use: bool) -> None:
        """Hear whether it is in use from now on; until now it was, or was not."""
        if self.in_use or in_use:
            self.touch(now)
        self.in_use = in_use

    def pause(self, now: float) -> None:
        """Hear that it is paused."""
        if self.paused_at is None:
            self.paused_at = now

    def wake(self, now: float) -> None:
        """Hear that its engine answers again."""
        if self.paused_at is not None:
            self._paused_before += now - self.paused_at
            self.paused_at = None
        self.touch(now)

    def used(self, now: float) -> float:
        """Return the seconds that count: since it was ready, without pauses."""
        until = now if self.paused_at is None else self.paused_at
        return max(0.0, until - self.ready_at - self._paused_before)

    @property
    def ends_at(self) -> float:
        """When its time is over."""
        return self.ready_at + self.limits.ttl_seconds

    @property
    def pauses_at(self) -> float | None:
        """When it is paused if nobody uses it before; None while it is in use, or paused."""
        if self.in_use or self.paused_at is not None:
            return None
        return self._used_at + self.limits.idle_seconds

    @property
    def removed_at(self) -> float | None:
        """When everything goes if nobody comes back; None while it is not paused."""
        if self.paused_at is None:
            return None
        return min(self.paused_at + self.limits.grace_seconds, self.ends_at)

    def due(self, now: float) -> Due | None:
        """Return what has to happen now; None for nothing."""
        if now >= self.ends_at:
            return Due.END
        if self.removed_at is not None and now >= self.removed_at:
            return Due.REMOVE
        if self.pauses_at is not None and now >= self.pauses_at:
            return Due.PAUSE
        return None

    def warning(self, now: float) -> str:
        """Return what people should hear now, each sentence once; mostly empty."""
        left = self.ends_at - now
        for before in sorted(END_WARNINGS):
            if left <= before < self.limits.ttl_seconds:
                if before in self._said:
                    break
                # What was missed meanwhile, for example in a long pause, is not made up for.
                self._said.update(value for value in END_WARNINGS if value >= before)
                return f"this session ends in {format_duration(max(0.0, left))}: its time is over"
        pauses_at = self.pauses_at
        if (
            pauses_at is not None
            and not self._pause_said
            and now >= pauses_at - self._pause_notice()
        ):
            self._pause_said = True
            return (
                f"this session is not used and is paused in "
                f"{format_duration(max(0.0, pauses_at - now))}"
            )
        return ""

    def _pause_notice(self) -> float:
        return min(PAUSE_WARNING, self.limits.idle_seconds / 2)

    def next_look(self, now: float) -> float:
        """Return when `due` or `warning` may have something new to say."""
        times = [self.ends_at]
        times += [self.ends_at - before for before in END_WARNINGS if before not in self._said]
        if self.removed_at is not None:
            times.append(self.removed_at)
        if self.pauses_at is not None:
            times += [self.pauses_at, self.pauses_at - self._pause_notice()]
        return min((time for time in times if time > now), default=now)
