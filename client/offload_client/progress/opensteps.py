"""Which of BuildKit's steps run, so that they can be ended when nobody tells of them any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.progress.clock import NANOSECONDS, nanoseconds
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex

COMMAND = "] RUN "
"""In the name of each step that runs a command; Dockerfile keywords are upper case there."""

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp


class OpenSteps:
    """Follows the batches of one build at one node."""

    def __init__(self) -> None:
        self._running: dict[str, Vertex] = {}
        self._latest_ns = 0
        self._command_began = False

    def take(self, batch: ProgressBatch) -> None:
        """Note what starts and ends."""
        for vertex in batch.vertices:
            self._saw(vertex.started_at)
            self._saw(vertex.completed_at)
            if vertex.HasField("started_at") and not vertex.cached and COMMAND in vertex.name:
                self._command_began = True
            if vertex.HasField("completed_at"):
                self._running.pop(vertex.digest, None)
            elif vertex.HasField("started_at"):
                self._running[vertex.digest] = vertex
        for status in batch.statuses:
            self._saw(status.timestamp)
        if batch.logs:
            self._saw(batch.logs[-1].timestamp)

    @property
    def repeatable(self) -> bool:
        """Whether the build may be started again unasked.

        Once BuildKit has the context and a command of the Dockerfile has begun, it may not: that
        command may have effects elsewhere, or be what killed the node.
        """
        loading = any(loads_context(vertex.name) for vertex in self._running.values())
        return loading or not self._command_began

    def canceled(self) -> ProgressBatch:
        """Return what ends all running steps as canceled, at the last time that the node told."""
        batch = ProgressBatch()
        seconds, nanos = divmod(self._latest_ns, NANOSECONDS)
        for vertex in self._running.values():
            ended = batch.vertices.add()
            ended.CopyFrom(vertex)
            ended.error = "context canceled"
            ended.completed_at.seconds, ended.completed_at.nanos = seconds, nanos
        self._running.clear()
        return batch

    def _saw(self, moment: Timestamp) -> None:
        self._latest_ns = max(self._latest_ns, nanoseconds(moment))


def loads_context(name: str) -> bool:
    """Return whether BuildKit's step reads a local source; names of its Dockerfile frontend."""
    return name == "[internal] load build context" or (
        name.startswith("[context ") and name.endswith("] load from client")
    )
