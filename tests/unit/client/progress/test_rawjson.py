from __future__ import annotations

import io
import json

import pytest

from offload_client.progress.display import make_display
from offload_client.progress.statusjson import encode_batch
from offload_proto.v1.events_pb2 import ProgressBatch
from offload_proto.v1.node_service_pb2 import Failure
from tests.unit.client.progress.recorded import Scribe, batches, objects


@pytest.mark.parametrize("name", ["parallel", "failing", "link", "cached"])
def test_recorded_build_is_byte_for_byte_what_buildctl_prints(name: str) -> None:
    assert [encode_batch(batch).decode() for batch in batches(name)] == [
        line for line in objects(name) if line.strip() != "{}"
    ]


def test_display_writes_every_batch_as_a_line() -> None:
    stream = io.BytesIO()
    with make_display("rawjson", stream, {}) as display:
        for batch in batches("parallel"):
            display.feed(batch)
    assert stream.getvalue().decode() == "".join(
        line for line in objects("parallel") if line.strip() != "{}"
    )


def test_text_is_escaped_as_go_does() -> None:
    line = encode_batch(Scribe().vertex("d", 'a<b>&"\u2028\u2029\x01ü\\', start=0)).decode()
    assert r'"name":"a\u003cb\u003e\u0026\"\u2028\u2029\u0001ü\\"' in line
    assert json.loads(line)["vertexes"][0]["name"] == 'a<b>&"\u2028\u2029\x01ü\\'


def test_times_have_no_trailing_zeros() -> None:
    line = encode_batch(Scribe().vertex("d", start=0, end=1.5))
    assert json.loads(line)["vertexes"][0] == {
        "digest": "d",
        "name": "step d",
        "started": "2027-01-15T08:00:00Z",
        "completed": "2027-01-15T08:00:01.5Z",
    }


def test_language_of_the_source_is_told() -> None:
    batch = Scribe().warning("d", "w", source_filename="Dockerfile", source_language="Dockerfile")
    source = json.loads(encode_batch(batch))["warnings"][0]["sourceInfo"]
    assert source == {"filename": "Dockerfile", "language": "Dockerfile"}


def test_an_empty_batch_is_no_line() -> None:
    assert encode_batch(ProgressBatch(sequence=3)) == b""


def test_local_steps_and_notices_are_steps_of_the_same_schema() -> None:
    stream = io.StringIO()
    with make_display("rawjson", stream, {}) as display:
        display.notice("warning", "the cache is away")
        with display.local_step("[offload] loading image") as step:
            step.progress("loading", 3, 5)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    names = {v["digest"]: v["name"] for line in lines for v in line.get("vertexes", [])}
    assert sorted(names.values()) == ["[offload] loading image", "[offload] the cache is away"]
    warning = next(line["warnings"][0] for line in lines if "warnings" in line)
    assert names[warning["vertex"]] == "[offload] the cache is away"
    status = lines[-1]["statuses"][0]
    assert (status["current"], status["total"], "completed" in status) == (3, 5, True)


def test_the_error_follows_as_text() -> None:
    stream = io.BytesIO()
    display = make_display("rawjson", stream, {})
    display.finish(Failure(kind=Failure.KIND_BUILD, message="no such stage"))
    assert stream.getvalue() == b"ERROR: failed to build: failed to solve: no such stage\n"
