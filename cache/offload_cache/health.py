"""A circuit breaker: a dead store is asked rarely and never slows a build down."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger(__name__)

REACHABLE = "the shared cache is reachable"


class StoreHealth:
    """Counts consecutive failures; from `limit` on, calls fail at once for `pause_seconds`.

    After the pause one call is let through as a probe: its success closes the circuit, its failure
    starts a pause of twice the length. Safe for any thread.
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int = 3,
        pause_seconds: float = 10.0,
        longest_pause_seconds: float = 60.0,
        probe_seconds: float = 60.0,
        on_change: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._limit = limit
        self._pause_seconds = self._next_pause = pause_seconds
        self._longest_pause_seconds = longest_pause_seconds
        self._probe_seconds = probe_seconds
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._retry_at = 0.0
        self._probe_until = 0.0
        self._cause = ""

    @property
    def reachable(self) -> bool:
        """Whether `check` would let a call through."""
        now = self._clock()
        with self._lock:
            return self._failures < self._limit or (
                now >= self._retry_at and now >= self._probe_until
            )

    @property
    def state(self) -> str:
        """One sentence for people."""
        with self._lock:
            return self._sentence()

    def _sentence(self) -> str:
        if self._failures < self._limit:
            return REACHABLE
        return f"the shared cache at {self._name} is not reachable: {self._cause}"

    def check(self) -> None:
        """Let a call through, or refuse it.

        Raises:
            CacheUnavailableError: the store failed a moment ago; it is not asked now.
        """
        now = self._clock()
        with self._lock:
            if self._failures < self._limit:
                return
            if now < self._retry_at or now < self._probe_until:
                raise CacheUnavailableError(self._sentence())
            # A probe that never reports back must not keep the circuit open for good.
            self._probe_until = now + self._probe_seconds

    def succeeded(self) -> None:
        """Note that the store answered."""
        with self._lock:
            recovered = self._failures >= self._limit
            self._failures = 0
            self._probe_until = 0.0
        if recovered:
            _log.info("cache.store.recovered", store=self._name)
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
            was_open = self._failures >= self._limit
            self._failures += weight
            self._cause = cause
            self._probe_until = 0.0
            opened = not was_open and self._failures >= self._limit
            now = self._clock()
            if opened:
                self._next_pause = self._pause_seconds
                self._retry_at = now + self._next_pause
            elif was_open and now >= self._retry_at:
                # A failed probe; calls that were under way when the circuit opened do not count.
                self._next_pause = min(self._next_pause * 2, self._longest_pause_seconds)
                self._retry_at = now + self._next_pause
            sentence = self._sentence()
        if opened:
            _log.warning("cache.store.unreachable", store=self._name, cause=cause)
            if self._on_change is not None:
                self._on_change(sentence)
