"""Counting the steps of a Dockerfile: how many there were, how many came from a cache."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import ProgressBatch

_STEP = re.compile(r"\[(?:[^\]]+ )?\d+/\d+\] ")
"""BuildKit numbers instructions: "[2/5]", "[build 2/5]", "[linux/arm64 build 2/5]"."""


class StepTally:
    """Counts vertices that stand for instructions, such as "[build 2/5] RUN make".

    BuildKit's own work (loading the Dockerfile, importing and exporting) is not counted: people
    ask how many of *their* steps were cached.
    """

    def __init__(self) -> None:
        self._before: dict[str, bool] = {}
        self._now: dict[str, bool] = {}

    def begin_attempt(self) -> None:
        """Hear that the build is solved once more; a step that ran before counts as run."""
        self._before = self._united()
        self._now = {}

    def add(self, batch: ProgressBatch) -> None:
        """Take news."""
        for vertex in batch.vertices:
            if vertex.HasField("completed_at") and _STEP.match(vertex.name):
                self._now[vertex.digest] = self._now.get(vertex.digest, False) or vertex.cached

    def _united(self) -> dict[str, bool]:
        united = dict(self._before)
        for digest, cached in self._now.items():
            united[digest] = cached and united.get(digest, True)
        return united

    @property
    def total(self) -> int:
        """Steps that have ended."""
        return len(self._united())

    @property
    def cached(self) -> int:
        """Steps whose result came from a cache."""
        return sum(self._united().values())
