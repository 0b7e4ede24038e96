"""The place of a build in the queue, as a step in the progress of BuildKit's clients."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from offload_builder.buildkit.notes import ProgressNote
from offload_core.units import format_duration

if TYPE_CHECKING:
    from types import TracebackType

    from offload_builder.node.proxy.feed import StatusFeed

REFRESH_SECONDS = 15.0
PATIENCE_SECONDS = 0.5
"""A build that waits less is not shown as waiting."""
_TOGETHER = "another build of this command waits for a node; they run together"


class QueueNote:
    """Shows each place as a step; use as a context manager around the wait."""

    def __init__(self, feed: StatusFeed, key: str) -> None:
        self._feed = feed
        self._key = key
        self._number = 0
        self._note: ProgressNote | None = None
        self._title = ""
        self._reason = ""
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(PATIENCE_SECONDS, self._begin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._note is not None:
            known = error is not None and isinstance(error, Exception)
            self._feed.tell(self._note.end(str(error) if known else ""))

    def place(self, position: int, reason: str) -> None:
        """Show a place; 0 when it is not known."""
        title = "[offload] waiting for a node"
        if position:
            title += f", queue position {position}"
        if title != self._title:
            if self._note is not None:
                self._feed.tell(self._note.end())
            self._title, self._reason = title, reason
            self._number += 1
            self._note = ProgressNote(f"{self._key}-queue-{self._number}", title)
            self._feed.tell(self._note.begin(reason))
        elif reason != self._reason and self._note is not None:
            self._reason = reason
            self._feed.tell(self._note.say(reason))

    def _begin(self) -> None:
        """Show that it waits, if the gateway has not said why."""
        self._timer = self._loop.call_later(REFRESH_SECONDS, self._refresh)
        if self._note is None:
            self.place(0, _TOGETHER)

    def _refresh(self) -> None:
        """Show that it still goes on."""
        self._timer = self._loop.call_later(REFRESH_SECONDS, self._refresh)
        if self._note is None:
            return
        waited = format_duration(round(self._loop.time() - self._since))
        self._feed.tell(self._note.say(f"{self._reason} (waiting for {waited})"))
