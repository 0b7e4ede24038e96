"""A circuit breaker: a dead store is asked rarely and never slows a build down."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger(__name__)

REACHABLE = "the shared cache is reachable"
PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 8.0
_INCIDENT_SECONDS = 30.0
"""Failures that follow each other within this are one incident, and one line in the log."""


@dataclass(slots=True)
class _Incident:
    """When a store last failed, in whatever way."""

    failed_at: float = -_INCIDENT_SECONDS


class StoreHealth:
    """Counts consecutive failures; from `limit` on, calls fail at once for `pause_seconds`.

    After the pause one call is let through as a probe: its success closes the circuit, its failure
    starts a pause of twice the length. Safe for any thread.

    Args:
        name: of the store, for people.
        limit: failures that open the circuit.
        pause_seconds: the first pause.
        longest_pause_seconds: bound of the pauses: a store that is well again is used this soon.
        probe_seconds: after this long without a word a probe counts as lost.
        calls_probe: whether the next call after the pause is the probe; else only `begin_probe`.
        trouble: how the state is worded.
        on_change: hears the new state.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int = 3,
        pause_seconds: float = PAUSE_SECONDS,
        longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
        probe_seconds: float = 60.0,
        calls_probe: bool = True,
        trouble: str = "is not reachable",
        on_change: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limit = limit
        self._pause_seconds = self._next_pause = pause_seconds
        self._longest_pause_seconds = max(longest_pause_seconds, pause_seconds)
        self._probe_seconds = probe_seconds
        self._calls_probe = calls_probe
        self._trouble = trouble
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._retry_at = 0.0
        self._probe_until = 0.0
        self._recovered_at = -_INCIDENT_SECONDS
        self._incident = _Incident()
        self._cause = ""

    def sibling(self, trouble: str, *, calls_probe: bool = True) -> StoreHealth:
        """Return a closed circuit with the same bounds for another kind of call to the store."""
        found = StoreHealth(
            self.name,
            limit=self.limit,
            pause_seconds=self._pause_seconds,
            longest_pause_seconds=self._longest_pause_seconds,
            probe_seconds=self._probe_seconds,
            calls_probe=calls_probe,
            trouble=trouble,
            on_change=self._on_change,
            clock=self._clock,
        )
        found._incident = self._incident
        return found

    @property
    def is_open(self) -> bool:
        """Whether the store failed so often that it is not used."""
        with self._lock:
            return self._failures >= self.limit

    @property
    def reachable(self) -> bool:
        """Whether `check` would let a call through."""
        with self._lock:
            return self._failures < self.limit or (self._calls_probe and self._probe_is_due())

    @property
    def state(self) -> str:
        """One sentence for people."""
        with self._lock:
            return self._sentence()

    @property
    def pause_left(self) -> float:
        """Seconds until the next probe may begin; 0 when it may begin now."""
        with self._lock:
            return max(0.0, max(self._retry_at, self._probe_until) - self._clock())

    def _sentence(self) -> str:
        if self._failures < self.limit:
            return REACHABLE
        return f"the shared cache at {self.name} {self._trouble}: {self._cause}"

    def _probe_is_due(self) -> bool:
        now = self._clock()
        return now >= self._retry_at and now >= self._probe_until

    def check(self) -> None:
        """Let a call through, or refuse it.

        Raises:
            CacheUnavailableError: the store failed a moment ago; it is not asked now.
        """
        with self._lock:
            if self._failures < self.limit:
                return
            if not self._calls_probe or not self._probe_is_due():
                raise CacheUnavailableError(self._sentence())
            self._hold_probe()

    def begin_probe(self) -> bool:
        """Return whether a probe is wanted now; then tell its end as that of any call."""
        with self._lock:
            if self._failures < self.limit or not self._probe_is_due():
                return False
            self._hold_probe()
            return True

    def _hold_probe(self) -> None:
        # A probe that never reports back must not keep the circuit open for good.
        self._probe_until = self._clock() + self._probe_seconds

    def succeeded(self) -> None:
        """Note that the store answered."""
        with self._lock:
            recovered = self._failures >= self.limit
            self._failures = 0
            self._probe_until = 0.0
            if recovered:
                self._recovered_at = self._clock()
        if recovered:
            _log.info("cache.store.recovered", store=self.name)
            if self._on_change is not None:
                self._on_change(REACHABLE)

    def abandoned(self) -> None:
        """Note that a call ended without an answer because its caller left."""
        with self._lock:
            self._probe_until = 0.0

    def failed(self, cause: str, *, weight: int = 1) -> None:
        """Note that the store did not answer, or refused.

        A failure that cost its caller seconds has more `weight` than one that came at once.
        """
        with self._lock:
            now = self._clock()
            was_open = self._failures >= self.limit
            self._failures += weight
            self._cause = cause
            self._probe_until = 0.0
            opened = not was_open and self._failures >= self.limit
            is_news = now - self._incident.failed_at >= _INCIDENT_SECONDS
            self._incident.failed_at = now
            if opened:
                # One that fails again soon after its recovery is only half well: it is left alone
                # for longer, so that it does not cost every build its patience.
                again = now - self._recovered_at < _INCIDENT_SECONDS
                self._lengthen(self._next_pause * 2 if again else self._pause_seconds, now)
            elif was_open and now >= self._retry_at:
                # A failed probe; calls that were under way when the circuit opened do not count.
                self._lengthen(self._next_pause * 2, now)
            sentence = self._sentence()
        if opened:
            say = _log.warning if is_news else _log.info
            say("cache.store.unreachable", store=self.name, trouble=self._trouble, cause=cause)
            if self._on_change is not None:
                self._on_change(sentence)
        elif is_news and not was_open:
            _log.warning("cache.store.failed", store=self.name, cause=cause)

    def _lengthen(self, pause_seconds: float, now: float) -> None:
        self._next_pause = min(pause_seconds, self._longest_pause_seconds)
        self._retry_at = now + self._next_pause
