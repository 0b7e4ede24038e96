"""The step that shows how the build context travels, or that it does not have to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from offload_client.progress.opensteps import loads_context
from offload_core.units import format_size

if TYPE_CHECKING:
    from offload_client.progress.display import Display
    from offload_client.progress.local import LocalStep
    from offload_proto.v1.events_pb2 import ProgressBatch

SENDING = "[offload] sending the build context"
ENDED = "[offload] build context"
"""Short, so that the numbers behind it fit on a screen."""
COUNTER = "transferring context:"
LINGER_SECONDS = 0.5
"""BuildKit asks for files in several goes; shorter pauses do not end the step."""
_SETTLED_SECONDS = 0.05
"""Shorter times say nothing about the rate."""


class SendingStep:
    """Shows what is sent of the build's local sources; for the event loop's thread."""

    def __init__(self, display: Display) -> None:
        """Show nothing yet."""
        self._display = display
        self._step: LocalStep | None = None
        self._started = 0.0
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._scans = 0
        self._files = 0
        self._listed_bytes = 0
        self._wanted_bytes = 0
        self._sent_bytes = 0
        self._sent_before = 0
        self._told = False

    def scanning(self) -> None:
        """A listing has begun."""
        self._scans += 1

    def listed(self, files: int, total_bytes: int) -> None:
        """It is complete."""
        self._scans -= 1
        self._files += files
        self._listed_bytes += total_bytes
        self._told = False

    def wanted(self, size_bytes: int) -> None:
        """The node wants so many bytes more."""
        self._wanted_bytes += size_bytes
        if size_bytes > 0 and self._step is None:
            self._step = self._display.local_step(SENDING)
            self._sent_before = self._sent_bytes
            self._started = self._last = time.monotonic()
            self._told = True
        self._update()

    def sent(self, size_bytes: int) -> None:
        """The node has so many bytes more."""
        self._sent_bytes += size_bytes
        self._last = time.monotonic()
        self._update()

    def forget_unsent(self) -> None:
        """The connection broke: what the node still wants, it says again."""
        self._wanted_bytes = self._sent_bytes

    def watch(self, batch: ProgressBatch) -> None:
        """Look out for the end of BuildKit's own step, behind which nothing is sent any more."""
        for vertex in batch.vertices:
            if vertex.HasField("completed_at") and loads_context(vertex.name):
                self._nothing_sent()

    def close(self, *, complete: bool) -> None:
        """End the step.

        Args:
            complete: the build worked, so the node has all that it wanted, acknowledged or not.
        """
        if complete:
            self._nothing_sent()
        if self._step is None:
            return
        if complete and self._sent_bytes < self._wanted_bytes:
            self._sent_bytes = self._wanted_bytes
            self._last = time.monotonic()
        if self._sent_bytes >= self._wanted_bytes:
            self._end()
        else:
            self._stop_timer()
            self._step.cancel()
            self._step = None

    def _update(self) -> None:
        if self._step is None:
            return
        self._stop_timer()
        total = max(self._wanted_bytes, self._sent_bytes)
        self._step.progress(COUNTER, self._sent_bytes, total, note=self._note())
        if self._sent_bytes >= self._wanted_bytes:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LINGER_SECONDS, self._end)

    def _note(self) -> str:
        return ", ".join(filter(None, (self._rate(), self._saved())))

    def _rate(self) -> str:
        seconds = self._last - self._started
        if seconds < _SETTLED_SECONDS:
            return ""
        return f"{format_size((self._sent_bytes - self._sent_before) / seconds)}/s"

    def _saved(self) -> str:
        saved = self._listed_bytes - self._wanted_bytes
        return f"{format_size(saved)} saved" if saved > 0 and not self._scans else ""

    def _end(self) -> None:
        step, self._step = self._step, None
        self._stop_timer()
        if step is None:
            return
        seconds = self._last - self._started
        text = f"{ENDED}: {format_size(self._sent_bytes)}"
        if not self._scans and self._listed_bytes > self._sent_bytes:
            text += f" of {format_size(self._listed_bytes)}"
        text += f" sent in {seconds:.1f}s"
        if rate := self._rate():
            text += f" ({rate})"
        if saved := self._saved():
            text += f", {saved}"
        step.progress_done(COUNTER)
        step.rename(text)
        step.done(seconds_ago=time.monotonic() - self._last)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _nothing_sent(self) -> None:
        if self._told or self._scans or not self._files or self._wanted_bytes:
            return
        self._told = True
        files = f"{self._files:,} file{'s' if self._files != 1 else ''}"
        text = f"{ENDED}: {format_size(self._listed_bytes)} in {files}, nothing to send"
        self._display.local_step(text).done(cached=True)
