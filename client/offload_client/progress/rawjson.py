"""JSON lines for programs: every batch at once, unmerged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.progress.base import BaseDisplay
from offload_client.progress.excerpt import failure_report
from offload_client.progress.statusjson import encode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.progress.output import Sink
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Failure


class RawJsonDisplay(BaseDisplay):
    """Writes BuildKit's client.SolveStatus objects, one per line.

    As with docker buildx, the error report of a failed build follows as text.
    """

    def __init__(self, sink: Sink) -> None:
        """Write to any stream."""
        super().__init__(sink, interval_seconds=0.0)
        self._guard_line: Callable[[bytes], bytes] | None = None
        self._lines: list[bytes] = []
        self._pending_bytes = 0

    def guard_lines_with(self, guard: Callable[[bytes], bytes]) -> None:
        """Change each line with `guard`, which keeps its meaning."""
        self._guard_line = guard

    def notice(self, level: str, text: str) -> None:
        """Show a sentence as a step that is done at once, since the schema has no other place."""
        with self.local_step(f"[offload] {text}") as step:
            if level == "warning":
                step.warn(text)

    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:  # noqa: ARG002
        line = encode_batch(batch)
        if self._guard_line is not None:
            line = self._guard_line(line)
        self._lines.append(line)
        self._pending_bytes += len(line)
        return self._pending_bytes

    def _notice(self, level: str, text: str) -> None:
        """Nothing is kept: a notice is a local step here."""

    def _render(self) -> bytes:
        data = b"".join(self._lines)
        self._lines.clear()
        self._pending_bytes = 0
        return data

    def _final(self, failure: Failure | None) -> bytes:
        data = self._render()
        return data if failure is None else data + self._report(failure)

    def _report(self, failure: Failure) -> bytes:
        report = failure_report(failure)
        return report if self._guard is None else self._guard(report)

    def _last_output(self, failure: Failure | None) -> bytes:
        """Return lines and report, each guarded in its own way."""
        return self._final(failure)
