"""No progress at all; a failure is still explained."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from offload_client.progress.base import ViewDisplay
from offload_client.progress.cells import last_lines

if TYPE_CHECKING:
    from offload_client.progress.step import Step
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Failure

_KEPT_CHUNKS = 64
_TAIL_LINES = 20


class QuietDisplay(ViewDisplay):
    """Writes nothing while the build runs, and only an error report at the end.

    Unlike BuildKit's quiet display it remembers the last output of the steps: who asks for quiet
    wants to know even more why it failed.
    """

    def _take(self, batch: ProgressBatch, *, local: bool) -> None:
        """Merge only: there is nothing to write, so the thread need not start."""
        with self._pump.lock:
            self._merge(batch, local=local)

    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:
        super()._merge(batch, local=local)
        for key in self.view.take_news():
            step = self.view.steps[key]
            if len(step.log) > _KEPT_CHUNKS:
                step.log = deque(step.log, maxlen=_KEPT_CHUNKS)
        return 0

    def notice(self, level: str, text: str) -> None:
        """Say nothing."""

    def begin_again(self, text: str) -> None:  # noqa: ARG002 - nothing is said
        """Forget the run that was lost."""
        with self._pump.lock:
            self.view.begin_again()

    def _notice(self, level: str, text: str) -> None:
        """Say nothing."""

    def _summary(self) -> bytes:
        """Say nothing."""
        return b""

    def _render(self) -> bytes:
        return b""

    def _final(self, failure: Failure | None) -> bytes:
        return self._ending(failure) if failure is not None else b""

    def _log_tail(self, step: Step) -> list[bytes]:
        lines = last_lines((data for _, data in reversed(step.log)), _TAIL_LINES)
        return [line.encode("utf-8", "replace") for line in lines]
