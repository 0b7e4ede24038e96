"""Takes down the steps of a build while BuildKit tells of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.node.steps import STEP
from offload_builder.node.why.trace import TracedStep

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import ProgressBatch, Vertex

_MAX_VERTICES = 20_000


class StepRecorder:
    """The vertices of one build; a repeated solve tells of the same ones again."""

    def __init__(self) -> None:
        self._vertices: dict[str, Vertex] = {}
        self._ran: set[str] = set()

    def add(self, batch: ProgressBatch) -> None:
        """Take news."""
        for vertex in batch.vertices:
            known = self._vertices.get(vertex.digest)
            if known is None:
                if len(self._vertices) >= _MAX_VERTICES:
                    continue
                known = self._vertices.setdefault(vertex.digest, type(vertex)())
            known.MergeFrom(vertex)
            del known.inputs[:]
            known.inputs.extend(dict.fromkeys(vertex.inputs))
            known.cached = vertex.cached
            if vertex.HasField("started_at") and not vertex.cached:
                self._ran.add(vertex.digest)

    def steps(self) -> tuple[TracedStep, ...]:
        """Return the instructions so far, in the order in which they began.

        Inputs that are no instructions are looked through.
        """
        return tuple(
            TracedStep(
                name=vertex.name,
                digest=digest,
                inputs=tuple(self._instructions(vertex)),
                cached=vertex.cached and digest not in self._ran,
                ended=vertex.HasField("completed_at"),
                seconds=_seconds(vertex) if digest in self._ran else 0.0,
            )
            for digest, vertex in sorted(self._vertices.items(), key=_begun)
            if STEP.match(vertex.name)
        )

    def _instructions(self, vertex: Vertex) -> list[str]:
        found: dict[str, None] = {}
        seen: set[str] = set()
        waiting = list(vertex.inputs)
        while waiting:
            digest = waiting.pop(0)
            if digest in seen:
                continue
            seen.add(digest)
            below = self._vertices.get(digest)
            if below is None:
                continue
            if STEP.match(below.name):
                found[digest] = None
            else:
                waiting += below.inputs
        return list(found)


def _seconds(vertex: Vertex) -> float:
    if not (vertex.HasField("started_at") and vertex.HasField("completed_at")):
        return 0.0
    passed = vertex.completed_at.ToDatetime() - vertex.started_at.ToDatetime()
    return max(0.0, passed.total_seconds())


def _begun(item: tuple[str, Vertex]) -> tuple[bool, int]:
    vertex = item[1]
    return not vertex.HasField("started_at"), vertex.started_at.ToNanoseconds()
