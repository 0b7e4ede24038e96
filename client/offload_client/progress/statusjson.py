"""One JSON object per batch, in BuildKit's own schema, for programs.

Field names, order and value forms are those of Go's encoding of BuildKit's client.SolveStatus
(client/graph.go), as `docker buildx build --progress=rawjson` prints it.
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from offload_client.progress.clock import nanoseconds, rfc3339_nano

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import (
        ProgressBatch,
        Vertex,
        VertexLog,
        VertexStatus,
        VertexWarning,
    )

# Go's encoder escapes these so that its output can stand inside HTML and JavaScript.
_GO_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


def encode_batch(batch: ProgressBatch) -> bytes:
    """Return a batch as one line with its line end; nothing when the batch is empty."""
    parts = []
    if batch.vertices:
        parts.append(_list("vertexes", [_vertex(vertex) for vertex in batch.vertices]))
    if batch.statuses:
        parts.append(_list("statuses", [_status(status) for status in batch.statuses]))
    if batch.logs:
        parts.append('"logs":[' + ",".join([_log(log) for log in batch.logs]) + "]")
    if batch.warnings:
        parts.append(_list("warnings", [warning_value(warning) for warning in batch.warnings]))
    if not parts:
        return b""
    return ("{" + ",".join(parts) + "}\n").encode()


def _list(name: str, values: list[dict[str, Any]]) -> str:
    return f'"{name}":' + _encoder.encode(values).translate(_GO_ESCAPES)


def _vertex(vertex: Vertex) -> dict[str, Any]:
    value: dict[str, Any] = {"digest": vertex.digest}
    if vertex.inputs:
        value["inputs"] = list(vertex.inputs)
    if vertex.name:
        value["name"] = vertex.name
    if vertex.HasField("started_at"):
        value["started"] = rfc3339_nano(nanoseconds(vertex.started_at))
    if vertex.HasField("completed_at"):
        value["completed"] = rfc3339_nano(nanoseconds(vertex.completed_at))
    if vertex.cached:
        value["cached"] = True
    if vertex.error:
        value["error"] = vertex.error
    if vertex.progress_group:
        group: dict[str, Any] = {"id": vertex.progress_group}
        if vertex.progress_group_name:
            group["name"] = vertex.progress_group_name
        if vertex.progress_group_weak:
            group["weak"] = True
        value["progressGroup"] = group
    return value


def _status(status: VertexStatus) -> dict[str, Any]:
    value: dict[str, Any] = {"id": status.id, "vertex": status.vertex}
    if status.name:
        value["name"] = status.name
    if status.total:
        value["total"] = status.total
    value["current"] = status.current
    value["timestamp"] = rfc3339_nano(nanoseconds(status.timestamp))
    if status.HasField("started_at"):
        value["started"] = rfc3339_nano(nanoseconds(status.started_at))
    if status.HasField("completed_at"):
        value["completed"] = rfc3339_nano(nanoseconds(status.completed_at))
    return value


def _log(log: VertexLog) -> str:
    # Made by hand because there may be very many: nothing in it needs escaping but the digest,
    # which is a digest.
    stream = f'"stream":{log.stream},' if log.stream else ""
    return (
        f'{{"vertex":{_encoder.encode(log.vertex)},{stream}"data":"{b64encode(log.data).decode()}",'
        f'"timestamp":"{rfc3339_nano(nanoseconds(log.timestamp))}"}}'
    )


def warning_value(warning: VertexWarning) -> dict[str, Any]:
    """Return a warning as BuildKit's client.VertexWarning."""
    value: dict[str, Any] = {"vertex": warning.vertex}
    if warning.level:
        value["level"] = warning.level
    if warning.short:
        value["short"] = _base64(warning.short)
    if warning.detail:
        value["detail"] = [_base64(line) for line in warning.detail]
    if warning.url:
        value["url"] = warning.url
    if warning.source_filename or warning.source_data:
        source = {"filename": warning.source_filename}
        if warning.source_data:
            source["data"] = _base64(warning.source_data)
        if warning.source_language:
            source["language"] = warning.source_language
        value["sourceInfo"] = source
    if warning.ranges:
        value["range"] = [
            {
                "start": _position(span.start_line, span.start_character),
                "end": _position(span.end_line, span.end_character),
            }
            for span in warning.ranges
        ]
    return value


def _position(line: int, character: int) -> dict[str, int]:
    value = {}
    if line:
        value["line"] = line
    if character:
        value["character"] = character
    return value


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
