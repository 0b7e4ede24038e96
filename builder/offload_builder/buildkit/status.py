"""Translates BuildKit's progress into ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_proto.buildkit.control_pb2 import StatusResponse
from offload_proto.v1 import events_pb2 as events

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_proto.buildkit import control_pb2 as control

MERGED_NANOSECONDS = 1_000_000
"""Times of output are shown with three decimals."""
MERGED_BYTES = 64 << 10


def progress_batch(message: bytes) -> events.ProgressBatch:
    """Return a serialised StatusResponse as a batch without a sequence number."""
    response = StatusResponse.FromString(message)
    batch = events.ProgressBatch()
    for vertex in response.vertexes:
        _add_vertex(batch, vertex)
    for counter in response.statuses:
        _add_status(batch, counter)
    _add_logs(batch, response.logs)
    for warning in response.warnings:
        _add_warning(batch, warning)
    return batch


def _add_vertex(batch: events.ProgressBatch, vertex: control.Vertex) -> None:
    added = batch.vertices.add(
        digest=vertex.digest,
        name=vertex.name,
        inputs=vertex.inputs,
        cached=vertex.cached,
        error=vertex.error,
    )
    if vertex.HasField("started"):
        added.started_at.CopyFrom(vertex.started)
    if vertex.HasField("completed"):
        added.completed_at.CopyFrom(vertex.completed)
    if vertex.HasField("progressGroup"):
        added.progress_group = vertex.progressGroup.id
        added.progress_group_name = vertex.progressGroup.name
        added.progress_group_weak = vertex.progressGroup.weak


def _add_status(batch: events.ProgressBatch, counter: control.VertexStatus) -> None:
    added = batch.statuses.add(
        id=counter.ID,
        vertex=counter.vertex,
        name=counter.name,
        current=counter.current,
        total=counter.total,
    )
    if counter.HasField("timestamp"):
        added.timestamp.CopyFrom(counter.timestamp)
    if counter.HasField("started"):
        added.started_at.CopyFrom(counter.started)
    if counter.HasField("completed"):
        added.completed_at.CopyFrom(counter.completed)


def _add_logs(batch: events.ProgressBatch, logs: Iterable[control.VertexLog]) -> None:
    """Add output; writes in quick succession become one piece.

    A program that does not buffer writes each line by itself, and what a piece costs on its way
    depends little on its size.
    """
    first: control.VertexLog | None = None
    parts: list[bytes] = []
    size = 0
    until_ns = 0
    for log in logs:
        data, moment_ns = log.msg, _nanoseconds(log)
        if (
            first is not None
            and moment_ns < until_ns
            and size + len(data) <= MERGED_BYTES
            and log.stream == first.stream
            and log.vertex == first.vertex
        ):
            parts.append(data)
            size += len(data)
            continue
        if first is not None:
            _add_log(batch, first, parts)
        first, parts, size = log, [data], len(data)
        until_ns = moment_ns + MERGED_NANOSECONDS
    if first is not None:
        _add_log(batch, first, parts)


def _add_log(batch: events.ProgressBatch, first: control.VertexLog, parts: Sequence[bytes]) -> None:
    added = batch.logs.add(vertex=first.vertex, stream=first.stream, data=b"".join(parts))
    if first.HasField("timestamp"):
        added.timestamp.CopyFrom(first.timestamp)


def _nanoseconds(log: control.VertexLog) -> int:
    return log.timestamp.seconds * 1_000_000_000 + log.timestamp.nanos


def _add_warning(batch: events.ProgressBatch, warning: control.VertexWarning) -> None:
    added = batch.warnings.add(
        vertex=warning.vertex,
        level=warning.level,
        short=warning.short,
        detail=warning.detail,
        url=warning.url,
        source_filename=warning.info.filename,
        source_data=warning.info.data,
        source_language=warning.info.language,
    )
    for place in warning.ranges:
        added.ranges.add(
            start_line=place.start.line,
            start_character=place.start.character,
            end_line=place.end.line,
            end_character=place.end.character,
        )
