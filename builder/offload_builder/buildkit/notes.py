"""Steps of our own in the progress that BuildKit's clients show: the queue, and remarks."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from offload_proto.buildkit import control_pb2 as control

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from offload_proto.v1.events_pb2 import ProgressBatch

_STDERR = 2


class ProgressNote:
    """One step; its methods return serialised StatusResponses.

    Args:
        key: tells it apart from all other steps of the build.
        name: for people.
    """

    def __init__(self, key: str, name: str) -> None:
        self._digest = "sha256:" + hashlib.sha256(f"offload-note\0{key}".encode()).hexdigest()
        self._name = name
        self._started = time.time_ns()

    def begin(self, text: str = "") -> bytes:
        """Begin it, with a line below it."""
        response = control.StatusResponse()
        vertex = response.vertexes.add(digest=self._digest, name=self._name)
        _set(vertex.started, self._started)
        self._add_line(response, text)
        return response.SerializeToString()

    def say(self, text: str) -> bytes:
        """Add a line."""
        response = control.StatusResponse()
        self._add_line(response, text)
        return response.SerializeToString()

    def end(self, error: str = "") -> bytes:
        """End it."""
        response = control.StatusResponse()
        vertex = response.vertexes.add(digest=self._digest, name=self._name, error=error)
        _set(vertex.started, self._started)
        _set(vertex.completed, time.time_ns())
        return response.SerializeToString()

    def _add_line(self, response: control.StatusResponse, text: str) -> None:
        if text:
            line = response.logs.add(
                vertex=self._digest, stream=_STDERR, msg=text.encode("utf-8", "replace") + b"\n"
            )
            _set(line.timestamp, time.time_ns())


def status_message(news: ProgressBatch) -> bytes:
    """Return steps and output of ours as a serialised StatusResponse; empty for nothing."""
    response = control.StatusResponse()
    for item in news.vertices:
        vertex = response.vertexes.add(digest=item.digest, name=item.name, error=item.error)
        for field, moment in (("started", item.started_at), ("completed", item.completed_at)):
            if item.HasField(f"{field}_at"):  # type: ignore[arg-type]
                getattr(vertex, field).CopyFrom(moment)
    for log in news.logs:
        line = response.logs.add(vertex=log.vertex, stream=log.stream, msg=log.data)
        line.timestamp.CopyFrom(log.timestamp)
    return response.SerializeToString()


def _set(moment: Timestamp, nanoseconds: int) -> None:
    moment.seconds, moment.nanos = divmod(nanoseconds, 1_000_000_000)
