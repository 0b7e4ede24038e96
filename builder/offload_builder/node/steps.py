"""Counting the steps of a Dockerfile: how many there were, how many came from a cache."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import ProgressBatch

_STEP = re.compile(r"\[(?!internal\]|auth\]|offload\])")


class StepTally:
    """Counts vertices that stand for instructions, such as "[build 2/5] RUN make".

    BuildKit's own work (loading the Dockerfile, importing and exporting) is not counted: people
    ask how many of *their* steps were cached.
    """

    def __init__(self) -> None:
        self._cached: dict[str, bool] = {}

    def add(self, batch: ProgressBatch) -> None:
        """Take news."""
        for vertex in batch.vertices:
            if vertex.HasField("completed_at") and _STEP.match(vertex.name):
                before = self._cached.get(vertex.digest, False)
                self._cached[vertex.digest] = before or vertex.cached

    @property
    def total(self) -> int:
        """Steps that have ended."""
        return len(self._cached)

    @property
    def cached(self) -> int:
        """Steps whose result came from a cache."""
        return sum(self._cached.values())
