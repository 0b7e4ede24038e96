"""The runs of one build, kept apart: the same step in a second run is another step.

BuildKit names a step by what it does, so a repeated build tells of the same names. Shown as they
are, what the lost run printed would be taken for output of the new one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from offload_proto.v1.events_pb2 import ProgressBatch

if TYPE_CHECKING:
    from collections.abc import Callable


class StepNames:
    """Gives the steps of one run names of their own; those of the first run stay as they are."""

    def __init__(self, run: int) -> None:
        """Name the steps of a run, counted from 0."""
        self._run = run
        self._digests: dict[str, str] = {}

    def digest(self, digest: str) -> str:
        """Return what stands for a step."""
        if not self._run or not digest:
            return digest
        own = self._digests.get(digest)
        if own is None:
            key = hashlib.sha256(f"run {self._run}\0{digest}".encode()).hexdigest()
            own = self._digests[digest] = f"sha256:{key}"
        return own

    def batch(self, batch: ProgressBatch) -> ProgressBatch:
        """Return a batch with these names; the batch itself stays as it is."""
        return renamed(batch, self.digest) if self._run else batch


def renamed(batch: ProgressBatch, digest: Callable[[str], str]) -> ProgressBatch:
    """Return a copy of a batch in which `digest` has named all steps."""
    own = ProgressBatch()
    own.CopyFrom(batch)
    for vertex in own.vertices:
        vertex.digest = digest(vertex.digest)
        vertex.inputs[:] = map(digest, vertex.inputs)
        vertex.progress_group = digest(vertex.progress_group)
    for status in own.statuses:
        status.vertex = digest(status.vertex)
    for log in own.logs:
        log.vertex = digest(log.vertex)
    for warning in own.warnings:
        warning.vertex = digest(warning.vertex)
    return own
