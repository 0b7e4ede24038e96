"""JSON lines for programs: every batch at once, unmerged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.progress.base import BaseDisplay
from offload_client.progress.excerpt import failure_report
from offload_client.progress.statusjson import encode_batch

if TYPE_CHECKING:
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
        self._lines: list[bytes] = []
        self._pending_bytes = 0

    def notice(self, level: str, text: str) -> None:
        """Show a sentence as a step that is done at once, since the schema has no other place."""
        with self.local_step(f"[offload] {text}") as step:
            if level == "warning":
                step.warn(text)

    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:  # noqa: ARG002
        line = encode_batch(batch)
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
        return data if failure is None else data + failure_report(failure)
