"""What a user sees when a build is solved once more: each step once, and no repaired fault.

BuildKit tells a repeated solve from its beginning. The steps keep their digests, so what was told
of a step that has ended is held back, unless it turns out to run after all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.failure import SolveFailure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_proto.v1.events_pb2 import ProgressBatch, Vertex

CANCELED = "context canceled"


class RepeatFilter:
    """Filters the progress of the attempts of one build, in place."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        """Steps that ended well in an earlier attempt."""
        self._ended: set[str] = set()
        self._held: dict[str, Vertex] = {}
        self._last = True
        self._fault = False
        self._failing_import = ""

    def begin_attempt(self, *, last: bool, cache_import: str = "") -> None:
        """Hear that BuildKit begins.

        Args:
            last: the faults of this attempt are final.
            cache_import: the reference of the cache that an earlier attempt could not read. What
                is left of it may be nothing by now, and BuildKit would call that an error.
        """
        self._told |= self._ended
        self._ended.clear()
        self._held.clear()
        self._last = last
        self._failing_import = f"importing cache manifest from {cache_import}"
        self._fault = False

    def apply(self, batch: ProgressBatch) -> None:
        """Take out of a batch what the user has seen or need not see."""
        vertices = list(batch.vertices)
        del batch.vertices[:]
        # Output shows that a step runs, although it ended before.
        for digest in dict.fromkeys(log.vertex for log in batch.logs):
            self._told.discard(digest)
            if (held := self._held.pop(digest, None)) is not None:
                batch.vertices.append(held)
        batch.vertices.extend(self._shown(vertices))
        if self._told:
            statuses = [status for status in batch.statuses if status.vertex not in self._told]
            warnings = [found for found in batch.warnings if found.vertex not in self._told]
            del batch.statuses[:], batch.warnings[:]
            batch.statuses.extend(statuses)
            batch.warnings.extend(warnings)

    def _shown(self, vertices: Iterable[Vertex]) -> Iterable[Vertex]:
        for vertex in vertices:
            if vertex.name == self._failing_import:
                vertex.error = ""
            if vertex.error and not self._last and self._is_repairable(vertex.error):
                # To the user it still runs: the next attempt ends it.
                vertex.error = ""
                vertex.ClearField("completed_at")
            if vertex.error:
                self._told.discard(vertex.digest)
            elif vertex.HasField("completed_at"):
                self._ended.add(vertex.digest)
            if vertex.digest in self._told:
                self._held[vertex.digest] = vertex
            else:
                yield vertex

    def _is_repairable(self, error: str) -> bool:
        if SolveFailure(message=error).is_cache_fault:
            self._fault = True
        return self._fault and (CANCELED in error or SolveFailure(message=error).is_cache_fault)
