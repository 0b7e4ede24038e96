"""Steps of a Dockerfile: how many there were, how many came from a cache, how long they took."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_proto.v1.nodes_service_pb2 import StepTime

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import ProgressBatch, Vertex

MAX_REPORTED = 1000
STEP = re.compile(r"\[(?:[^\]]+ )?\d+/\d+\] ")
"""BuildKit numbers instructions: "[2/5]", "[build 2/5]", "[linux/arm64 build 2/5]"."""
_BASE = re.compile(STEP.pattern + "FROM ")


@dataclass(slots=True)
class _Step:
    name: str
    cached: bool
    milliseconds: int
    failed: bool


class StepTally:
    """Counts vertices that stand for instructions, such as "[build 2/5] RUN make".

    BuildKit's own work (loading the Dockerfile, importing and exporting) is not counted: people
    ask how many of *their* steps were cached. Nor is a FROM, which BuildKit mostly does not call
    cached when all that stands on it is.
    """

    def __init__(self) -> None:
        self._before: dict[str, _Step] = {}
        self._now: dict[str, _Step] = {}

    def begin_attempt(self) -> None:
        """Hear that the build is solved once more; a step that ran before counts as run."""
        self._before = self._united()
        self._now = {}

    def add(self, batch: ProgressBatch) -> None:
        """Take news."""
        for vertex in batch.vertices:
            is_step = STEP.match(vertex.name) and not _BASE.match(vertex.name)
            if is_step and vertex.HasField("completed_at"):
                known = self._now.get(vertex.digest)
                cached = vertex.cached or (known is not None and known.cached)
                taken = max(_milliseconds(vertex), 0 if known is None else known.milliseconds)
                self._now[vertex.digest] = _Step(vertex.name, cached, taken, bool(vertex.error))

    def _united(self) -> dict[str, _Step]:
        united = dict(self._before)
        for digest, step in self._now.items():
            before = united.get(digest)
            if before is None or before.cached:
                united[digest] = step
        return united

    def _steps(self) -> list[_Step]:
        """Return each step once.

        Of a step that it does once for two builds, BuildKit may tell each of them under both
        builds' digests (solver/jobs.go, setEdge).
        """
        steps: dict[str, _Step] = {}
        for step in self._united().values():
            known = steps.get(step.name, step)
            steps[step.name] = _Step(
                step.name,
                cached=known.cached and step.cached,
                milliseconds=max(known.milliseconds, step.milliseconds),
                failed=known.failed or step.failed,
            )
        return list(steps.values())

    @property
    def total(self) -> int:
        """Steps that have ended."""
        return len(self._steps())

    @property
    def cached(self) -> int:
        """Steps whose result came from a cache."""
        return sum(step.cached for step in self._steps())

    def times(self, definition: str) -> list[StepTime]:
        """Return the steps that worked with how long they took, for the gateway.

        A step is known by its name within its definition: BuildKit's own digests of steps change
        with the build context.

        Args:
            definition: names the Dockerfile, target and platforms, the same on every node.
        """
        steps = [step for step in self._steps() if not step.failed][:MAX_REPORTED]
        return [
            StepTime(key=_key(definition, step), milliseconds=step.milliseconds, cached=step.cached)
            for step in steps
        ]


def _key(definition: str, step: _Step) -> str:
    return hashlib.sha256(f"{definition}\0{step.name}".encode()).hexdigest()[:32]


def _milliseconds(vertex: Vertex) -> int:
    if not vertex.HasField("started_at"):
        return 0
    taken = vertex.completed_at.ToNanoseconds() - vertex.started_at.ToNanoseconds()
    return max(0, taken // 1_000_000)
