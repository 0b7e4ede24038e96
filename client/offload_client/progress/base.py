"""What all displays share: the lock, the writing thread, local steps, and the end."""

from __future__ import annotations

import contextlib
import itertools
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from offload_client.progress.cells import printable
from offload_client.progress.excerpt import failure_report, step_excerpt, warnings_report
from offload_client.progress.local import LocalStep
from offload_client.progress.model import BuildView
from offload_client.progress.output import Pump, Sink
from offload_client.progress.style import Palette, paint

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from offload_client.progress.step import Step
    from offload_client.progress.summary import Totals
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Failure

# BuildKit's displays draw at most this often too.
FRAME_SECONDS = 0.1
# How long an interrupted command waits for its last output to be read.
_PATIENCE_SECONDS = 2.0
_ROOM_POLL_SECONDS = 0.02


class BaseDisplay(ABC):
    """Takes batches from one thread, renders and writes in another.

    A subclass says how a batch is merged, what is written while the build runs, and at the end.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        interval_seconds: float = FRAME_SECONDS,
        tick_seconds: float | None = None,
    ) -> None:
        """Prepare; nothing is written before the first event."""
        self._sink = sink
        self._pump = Pump(
            sink, self._render, interval_seconds=interval_seconds, tick_seconds=tick_seconds
        )
        self._local_steps = itertools.count(1)
        self._finished = False
        self._totals: Totals | None = None
        self._guard: Callable[[bytes], bytes] | None = None

    def guard_with(self, guard: Callable[[bytes], bytes]) -> None:
        """Change with `guard` the last output, which is in no form that is safe by itself.

        For logs of systems that take orders from what they show; see `ci.guard`.
        """
        self._guard = guard

    def feed(self, batch: ProgressBatch) -> None:
        """Show what happened; returns at once, and is ignored after `finish`.

        Only when more than 64 MiB of output wait for a reader that does not read does it wait.
        """
        self._take(batch, local=False)

    @property
    def crowded(self) -> bool:
        """Much output waits for its reader."""
        return self._pump.crowded

    async def room(self) -> None:
        """Wait while much output waits for its reader; for who feeds from an event loop."""
        import asyncio

        while self._pump.crowded:  # noqa: ASYNC110 - the writing thread knows no event loop
            await asyncio.sleep(_ROOM_POLL_SECONDS)

    def local_step(self, name: str) -> LocalStep:
        """Start a step of the client itself; its end is up to the caller."""
        return LocalStep(name, self._take_local, next(self._local_steps))

    def notice(self, level: str, text: str) -> None:
        """Show a sentence at once.

        Args:
            level: "info" or "warning".
            text: one line.
        """
        if self._finished:
            return
        with self._pump.lock:
            self._notice(level, text)
        self._pump.changed()

    def begin_again(self, text: str) -> None:
        """Show with a sentence that the build starts once more, elsewhere.

        All that was told of the former run is shown before the sentence.

        Args:
            text: one line.
        """
        self.notice("warning", text)

    def finish(self, failure: Failure | None = None, totals: Totals | None = None) -> None:
        """Write all that waits, then why the build failed or what its warnings were.

        Blocks until the reader has taken everything; later calls do nothing.

        Args:
            failure: how the build failed; None when it worked or the caller tells of the failure.
            totals: numbers of the build, for a summary.

        Raises:
            Exception: a fault of the display itself.
        """
        self._totals = totals
        self._finish(failure, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish(None)
            return
        # The error on its way matters more than one of the display, and more than a reader
        # that has stopped reading.
        with contextlib.suppress(Exception):
            self._finish(None, _PATIENCE_SECONDS)

    def _finish(self, failure: Failure | None, timeout_seconds: float | None) -> None:
        if not self._finished:
            self._finished = True
            self._pump.close(lambda: self._last_output(failure), timeout_seconds)
        elif timeout_seconds is not None:
            # Interrupted while another thread waits for the reader.
            self._pump.give_up(timeout_seconds)

    def _last_output(self, failure: Failure | None) -> bytes:
        data = self._final(failure)
        return data if self._guard is None else self._guard(data)

    def _take_local(self, batch: ProgressBatch) -> None:
        self._take(batch, local=True)

    def _take(self, batch: ProgressBatch, *, local: bool) -> None:
        if self._finished:
            return
        with self._pump.lock:
            pending = self._merge(batch, local=local)
        self._pump.changed(pending)

    @abstractmethod
    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:
        """Take a batch; return the bytes that wait to be written. Called under the lock."""

    @abstractmethod
    def _render(self) -> bytes:
        """Return what is to be written now. Called under the lock."""

    @abstractmethod
    def _notice(self, level: str, text: str) -> None:
        """Keep a sentence for the next rendering. Called under the lock."""

    @abstractmethod
    def _final(self, failure: Failure | None) -> bytes:
        """Return the last output. Called under the lock."""


class ViewDisplay(BaseDisplay):
    """A display for people, over a merged view of the build."""

    def __init__(
        self,
        sink: Sink,
        *,
        expand_warnings: bool = False,
        palette: Palette | None = None,
        tick_seconds: float | None = None,
    ) -> None:
        """Start with an empty view.

        Args:
            sink: where the output goes.
            expand_warnings: give warnings with their details at the end.
            palette: colours; None for none.
            tick_seconds: draw after this time also when nothing happened.
        """
        super().__init__(sink, tick_seconds=tick_seconds)
        self.view = BuildView(time.monotonic())
        self._expand_warnings = expand_warnings
        self._palette = palette or Palette()

    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:
        self.view.apply(batch, time.monotonic(), local=local)
        return self.view.pending_log_bytes

    def begin_again(self, text: str) -> None:
        """Show with a sentence that the build starts once more, elsewhere."""
        if self._finished:
            return
        with self._pump.lock:
            self._settle()
            self.view.begin_again()
            self._notice("warning", text)
        self._pump.changed()

    def _settle(self) -> None:
        """Keep for the next rendering what still waits of the steps. Called under the lock."""

    def _ending(self, failure: Failure | None) -> bytes:
        """Return the error report or the list of warnings."""
        excerpts = self.excerpts()
        if failure is not None:
            # The report of what went wrong is in one piece, as docker's, and the last word.
            parts = [self._summary(), excerpts, failure_report(failure)]
        else:
            parts = [excerpts, self._warning_list(), self._summary()]
        return b"".join(parts)

    def excerpts(self) -> bytes:
        """Return the last output of the steps that failed."""
        return b"".join(
            step_excerpt(step, self._log_tail(step))
            for step in self.view.shown
            # What went wrong in a step of the client, the client tells itself.
            if step.failed and not step.local
        )

    def _warning_list(self) -> bytes:
        headline, lines = warnings_report(self.view.warnings, expand=self._expand_warnings)
        if not headline:
            return b""
        headline = paint(headline, self._palette.warning)
        return f"\n{headline}\n{lines}".encode("utf-8", "replace")

    def _summary(self) -> bytes:
        if self._totals is None:
            return b""
        from offload_client.progress.summary import summary_lines

        lines = summary_lines(self.view, self._totals, time.monotonic())
        return "".join(f"{printable(line)}\n" for line in lines).encode("utf-8", "replace")

    @abstractmethod
    def _log_tail(self, step: Step) -> list[bytes]:
        """Return the last lines of a failed step, for the report."""
