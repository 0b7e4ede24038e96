from __future__ import annotations

import base64
import json

import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.status_pb2 import Status

from offload_builder.buildkit import Attributed, SolveFailure, SolveSpec
from offload_builder.buildkit.failure import failure_from_status
from offload_builder.buildkit.filesync import header_values
from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.session import session_headers
from offload_builder.buildkit.solve import solve_request
from offload_builder.buildkit.status import progress_batch
from offload_proto.buildkit import control_pb2 as control
from offload_proto.v1.node_service_pb2 import Failure

URL = "github.com/moby/buildkit/"


def status(message: str, **details: object) -> GrpcError:
    kinds = {"Vertex": "errdefs.", "Source": "errdefs.", "Frontend": "errdefs."}
    packed = [
        Any(
            type_url=f"{URL}{kinds.get(name, 'gatewayapi.')}{name}+json",
            value=value if isinstance(value, bytes) else json.dumps(value).encode(),
        )
        for name, value in details.items()
    ]
    whole = Status(code=2, message=message, details=packed)
    return GrpcError(2, message[:10], whole.SerializeToString())


def test_a_failed_step_has_vertex_exit_code_and_place():
    failure = failure_from_status(
        status(
            "process did not complete successfully: exit code: 3",
            Vertex={"digest": "sha256:ab"},
            ExitMessage={"Code": 3},
            Source={
                "info": {
                    "filename": "Dockerfile",
                    "data": base64.b64encode(b"FROM x\nRUN y\n").decode(),
                },
                "ranges": [{"start": {"line": 2}, "end": {"line": 2, "character": 5}}],
            },
            Frontend={"name": "dockerfile.v0"},
        )
    )
    assert failure == SolveFailure(
        message="process did not complete successfully: exit code: 3",
        vertex="sha256:ab",
        process_exit_code=3,
        source_filename="Dockerfile",
        source_data=b"FROM x\nRUN y\n",
        ranges=((2, 0, 2, 5),),
        frontend="dockerfile.v0",
    )
    message = failure.to_message()
    assert message.kind == Failure.KIND_BUILD
    assert message.source_ranges[0].end_character == 5


@pytest.mark.parametrize("value", [b"no json", b"[]", b'{"info": 3, "ranges": [1]}'])
def test_unreadable_details_are_left_out(value):
    failure = failure_from_status(status("broken", Source=value, Vertex=value, Stack=value))
    assert failure == SolveFailure("broken", vertex=failure.vertex)


def test_details_that_are_no_status_are_left_out():
    assert failure_from_status(GrpcError(2, "text", b"\xff\xff")).message == "text"


def test_registry_logins_are_recognised():
    failure = SolveFailure("failed to resolve source metadata: x: 401 Unauthorized")
    assert failure.is_registry_auth
    assert not failure.is_cache_fault
    assert failure.to_message().kind == Failure.KIND_REGISTRY_AUTH


@pytest.mark.parametrize(
    ("text", "mismatch"),
    [
        ("failed to copy: unexpected commit digest sha256:1, expected sha256:2", True),
        ("could not fetch content descriptor sha256:1: not found", False),
        ("short read: expected 10 bytes but got 5: unexpected EOF", False),
    ],
)
def test_cache_faults_are_recognised(text, mismatch):
    failure = SolveFailure(text)
    assert failure.is_cache_fault
    assert failure.is_digest_mismatch is mismatch


def test_a_failed_process_is_no_cache_fault_whatever_its_command_says():
    failure = SolveFailure(
        'process "grep short read" failed: 401 unauthorized', process_exit_code=1
    )
    assert not failure.is_cache_fault
    assert not failure.is_registry_auth


def test_cache_imports_are_sent_twice():
    spec = SolveSpec(
        {"filename": "Dockerfile"},
        exporters=[Attributed("image", {"name": "x", "push": "true"})],
        cache_imports=[Attributed("registry", {"ref": "host/a"})],
        cache_exports=[Attributed("registry", {"ref": "host/b", "mode": "max"})],
        entitlements=["network.host"],
        internal=True,
    )
    request = control.SolveRequest.FromString(solve_request(spec, "session"))
    assert request.Ref == spec.ref
    assert request.Session == "session"
    assert request.Internal
    assert json.loads(request.FrontendAttrs["cache-imports"]) == [
        {"Type": "registry", "Attrs": {"ref": "host/a"}}
    ]
    assert request.Cache.Imports[0].Attrs["ref"] == "host/a"
    assert request.Cache.Exports[0].Attrs["mode"] == "max"
    assert request.Exporters[0].Attrs["push"] == "true"
    assert "cache-imports" not in spec.frontend_attributes


def test_progress_is_translated_and_counted():
    response = control.StatusResponse()
    vertex = response.vertexes.add(digest="d1", name="[1/2] RUN", inputs=["d0"], cached=True)
    vertex.started.FromMilliseconds(1000)
    vertex.completed.FromMilliseconds(2000)
    vertex.progressGroup.id, vertex.progressGroup.weak = "g", True
    response.vertexes.add(digest="d2", error="boom")
    counter = response.statuses.add(ID="layer", vertex="d1", current=5, total=10)
    counter.completed.FromMilliseconds(3000)
    response.logs.add(vertex="d1", stream=2, msg=b"\xff").timestamp.FromMilliseconds(4000)
    warning = response.warnings.add(vertex="d1", level=1, short=b"s", detail=[b"a", b"b"], url="u")
    warning.info.filename, warning.info.data = "Dockerfile", b"FROM"
    warning.ranges.add().start.line = 7

    batch = progress_batch(response.SerializeToString())
    assert batch.sequence == 0
    first, second = batch.vertices
    assert (first.name, list(first.inputs), first.cached) == ("[1/2] RUN", ["d0"], True)
    assert first.completed_at.ToMilliseconds() == 2000
    assert (first.progress_group, first.progress_group_weak) == ("g", True)
    assert not second.HasField("started_at")
    assert (batch.statuses[0].id, batch.statuses[0].total) == ("layer", 10)
    assert not batch.statuses[0].HasField("started_at")
    assert (batch.logs[0].stream, batch.logs[0].data) == (2, b"\xff")
    assert (batch.warnings[0].source_data, batch.warnings[0].ranges[0].start_line) == (b"FROM", 7)


def test_escaped_headers_are_read():
    metadata = {
        "followpaths": ["a b"],
        "exclude-patterns": ["%C3%A4+b", "c%2Bd"],
        "exclude-patterns-encoded": ["1"],
    }
    assert header_values(metadata, "followpaths") == ["a b"]
    assert header_values(metadata, "exclude-patterns") == ["ä b", "c+d"]
    assert header_values(metadata, "include-patterns") == []


@pytest.mark.parametrize(
    ("key", "sent", "encoded"), [("proj/a b", "proj/a b", False), ("ü+1", "%C3%BC%2B1", True)]
)
def test_a_shared_key_that_is_no_header_is_escaped(key, sent, encoded):
    headers = dict(session_headers("id", key, ["/a/b"]))
    assert headers["x-docker-expose-session-sharedkey"] == sent
    assert ("x-docker-expose-session-sharedkey-encoded" in headers) is encoded
