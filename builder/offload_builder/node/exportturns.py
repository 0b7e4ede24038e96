"""When exports of the cache begin: nobody waits for them, and builds need the processors."""

from __future__ import annotations

import asyncio
import contextlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PATIENCE_SECONDS = 2.0
"""Other nodes have what was built later by this at most."""


def builds_crowd(running: int) -> bool:
    """Return whether so many builds leave no processor for work that nobody waits for."""
    return 2 * running > len(os.sched_getaffinity(0))


class ExportTurns:
    """Lets some exports run at a time, each when builds leave room for it or after a while.

    Args:
        slots: so many at a time.
        crowded: whether the builds that run now need all processors.
        patience_seconds: an export begins after so long in any case.
    """

    def __init__(
        self,
        slots: int,
        crowded: Callable[[], bool],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._slots = asyncio.Semaphore(max(1, slots))
        self._crowded = crowded
        self._patience_seconds = patience_seconds
        self._open: dict[asyncio.Event, None] = {}

    @property
    def open(self) -> int:
        """How many exports wait or run."""
        return len(self._open)

    def look(self) -> None:
        """Hear that builds have ended."""
        if not self._crowded():
            for go in self._open:
                go.set()

    @asynccontextmanager
    async def turn(self, go: asyncio.Event) -> AsyncIterator[None]:
        """Wait until an export may begin; it ends with the context.

        Args:
            go: of this export alone; set by anybody who needs what it holds, to have it begin.
        """
        self._open[go] = None
        try:
            self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_seconds):
                    await go.wait()
            async with self._slots:
                yield
        finally:
            del self._open[go]
