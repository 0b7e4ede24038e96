"""Recorded builds of tests/data/progress as the messages that a node sends, and made-up ones."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_proto.v1.events_pb2 import ProgressBatch

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

DATA = Path(__file__).parents[3] / "data" / "progress"
START_NS = 1_800_000_000_000_000_000


def objects(name: str) -> list[str]:
    """Return the lines of a recorded build."""
    return (DATA / f"{name}.rawjson").read_text(encoding="utf-8").splitlines(keepends=True)


def batches(name: str) -> list[ProgressBatch]:
    """Return a recorded build as a node sends it."""
    return [_batch(json.loads(line), number) for number, line in enumerate(objects(name), 1)]


def plain(name: str) -> str:
    """Return what BuildKit's printer made of it."""
    with (DATA / f"{name}.plain").open(encoding="utf-8", newline="") as file:
        return file.read()


class Scribe:
    """Makes messages of steps with round times."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def batch(self) -> ProgressBatch:
        return ProgressBatch()

    def vertex(
        self,
        digest: str,
        name: str = "",
        *,
        start: float | None = None,
        end: float | None = None,
        **fields: Any,
    ) -> ProgressBatch:
        """Return a batch with one vertex; times are seconds after the begin of the build."""
        batch = ProgressBatch()
        vertex = batch.vertices.add(digest=digest, name=name or f"step {digest}", **fields)
        if start is not None:
            at(vertex.started_at, start)
        if end is not None:
            at(vertex.completed_at, end)
        return batch

    def log(self, digest: str, data: bytes, moment: float = 0.0) -> ProgressBatch:
        batch = ProgressBatch()
        at(batch.logs.add(vertex=digest, stream=1, data=data).timestamp, moment)
        return batch

    def counter(
        self,
        digest: str,
        counter: str,
        current: int,
        total: int = 0,
        *,
        moment: float = 0.0,
        start: float | None = 0.0,
        end: float | None = None,
    ) -> ProgressBatch:
        batch = ProgressBatch()
        status = batch.statuses.add(id=counter, vertex=digest, current=current, total=total)
        at(status.timestamp, moment)
        if start is not None:
            at(status.started_at, start)
        if end is not None:
            at(status.completed_at, end)
        return batch

    def warning(self, digest: str, short: str, **fields: Any) -> ProgressBatch:
        batch = ProgressBatch()
        batch.warnings.add(vertex=digest, level=1, short=short.encode(), **fields)
        return batch


def at(timestamp: Timestamp, seconds: float) -> None:
    """Set a timestamp to seconds after the begin of the build."""
    timestamp.seconds, timestamp.nanos = divmod(START_NS + round(seconds * 1e9), 10**9)


def _batch(value: dict[str, Any], number: int) -> ProgressBatch:
    batch = ProgressBatch(sequence=number)
    for item in value.get("vertexes", []):
        group = item.get("progressGroup", {})
        vertex = batch.vertices.add(
            digest=item["digest"],
            name=item.get("name", ""),
            inputs=item.get("inputs", []),
            cached=item.get("cached", False),
            error=item.get("error", ""),
            progress_group=group.get("id", ""),
            progress_group_name=group.get("name", ""),
            progress_group_weak=group.get("weak", False),
        )
        _parse(vertex.started_at, item.get("started"))
        _parse(vertex.completed_at, item.get("completed"))
    for item in value.get("statuses", []):
        status = batch.statuses.add(
            id=item["id"],
            vertex=item["vertex"],
            name=item.get("name", ""),
            current=item["current"],
            total=item.get("total", 0),
        )
        _parse(status.timestamp, item["timestamp"])
        _parse(status.started_at, item.get("started"))
        _parse(status.completed_at, item.get("completed"))
    for item in value.get("logs", []):
        log = batch.logs.add(
            vertex=item["vertex"], stream=item.get("stream", 0), data=_bytes(item["data"])
        )
        _parse(log.timestamp, item["timestamp"])
    for item in value.get("warnings", []):
        warning = batch.warnings.add(
            vertex=item["vertex"],
            level=item.get("level", 0),
            short=_bytes(item["short"]),
            detail=[_bytes(line) for line in item.get("detail", [])],
            url=item.get("url", ""),
            source_filename=item["sourceInfo"]["filename"],
            source_data=_bytes(item["sourceInfo"]["data"]),
        )
        for span in item.get("range", []):
            warning.ranges.add(
                start_line=span["start"].get("line", 0),
                start_character=span["start"].get("character", 0),
                end_line=span["end"].get("line", 0),
                end_character=span["end"].get("character", 0),
            )
    return batch


def _parse(timestamp: Timestamp, text: str | None) -> None:
    if text is None:
        return
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    timestamp.seconds = int(datetime.fromisoformat(seconds + "+00:00").timestamp())
    timestamp.nanos = int(fraction.ljust(9, "0") or 0)


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
