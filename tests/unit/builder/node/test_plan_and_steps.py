"""From request to solve, what counts as a step, and what a repeated solve shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.outcomes import error_of, failure_of
from offload_builder.node.repeats import RepeatFilter
from offload_builder.node.solveplan import (
    NameRewriter,
    cache_entry_key,
    check_spec,
    exporters,
    frontend_attributes,
    likeness,
    shared_key_base,
)
from offload_builder.node.steps import StepTally
from offload_core.errors import (
    BuildCanceledError,
    BuildFailedError,
    ContextChangedError,
    ContextError,
    InternalError,
    NodeLostError,
    QueueTimeoutError,
    QuotaExceededError,
    RegistryAuthError,
    UsageError,
)
from offload_proto.v1.build_spec_pb2 import BuildSpec, Output
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex, VertexLog, VertexStatus
from offload_proto.v1.node_service_pb2 import InlineFile, Success

REPOSITORY = "127.0.0.1:5000/cafe/image"


def spec(**values) -> BuildSpec:
    return BuildSpec(**{"dockerfile_path": "Dockerfile"} | values)


def test_plain_request():
    check_spec(spec())
    assert frontend_attributes(spec()) == {"filename": "Dockerfile"}
    assert exporters(spec(), REPOSITORY) == []


def test_every_flag_has_its_attribute():
    found = frontend_attributes(
        spec(
            target="t",
            platforms=["linux/amd64", "linux/arm64"],
            no_cache=True,
            pull=True,
            build_args={"A": "1"},
            labels={"l": "2"},
        )
    )
    assert found == {
        "filename": "Dockerfile",
        "target": "t",
        "platform": "linux/amd64,linux/arm64",
        "no-cache": "",
        "image-resolve-mode": "pull",
        "build-arg:A": "1",
        "label:l": "2",
    }
    assert "no-cache" not in frontend_attributes(spec(no_cache=True), use_cache=False)


def test_users_cannot_redirect_the_image_in_the_pools_registry():
    outputs = [
        Output(type=Output.TYPE_IMAGE, attributes={"name": "evil", "push": "false"}),
        Output(type=Output.TYPE_IMAGE),
    ]
    (image,) = exporters(spec(tags=["a:1"], outputs=outputs), REPOSITORY)
    assert image.attributes["name"] == f"{REPOSITORY}:result"
    assert (image.attributes["push"], image.attributes["store"]) == ("true", "false")


def test_each_output_keeps_its_place():
    kinds = [Output.TYPE_CACHE_ONLY, Output.TYPE_LOCAL, Output.TYPE_OCI, Output.TYPE_REGISTRY]
    plan = exporters(
        spec(tags=["a:1", "b:2"], outputs=[Output(type=kind) for kind in kinds]), REPOSITORY
    )
    assert [(item.type, item.output_index, item.streams) for item in plan] == [
        ("tar", 1, True),
        ("oci", 2, True),
        ("image", 3, False),
    ]
    assert plan[1].attributes["name"] == plan[2].attributes["name"] == "a:1,b:2"


@pytest.mark.parametrize(
    "bad",
    [
        {"frontend_attributes": {"x": "y"}},
        {"outputs": [Output()]},
        {"outputs": [Output(type=Output.TYPE_OCI, attributes={"tar": "false"})]},
        {"dockerfile_path": ""},
        {"dockerfile_path": ".."},
        {"dockerfile_path": "a/b"},
    ],
)
def test_what_this_node_does_not_know_is_refused(bad):
    with pytest.raises(UsageError):
        check_spec(spec(**bad))


def test_cache_keys_tell_kinds_of_builds_apart():
    kinds = [
        spec(),
        spec(target="a"),
        spec(dockerfile_path="a"),
        spec(platforms=["linux/arm64"]),
    ]
    keys = [cache_entry_key(item, "linux/amd64") for item in kinds]
    assert len(set(keys)) == 4
    assert cache_entry_key(spec(platforms=["linux/amd64"]), "linux/amd64") == keys[0]
    assert keys[0] == cache_entry_key(spec(no_cache=True, build_args={"A": "1"}), "linux/amd64")
    assert shared_key_base("p", kinds[0], "linux/amd64") != shared_key_base(
        "q", kinds[0], "linux/amd64"
    )


@given(st.text(alphabet="abc /:", max_size=20), st.text(alphabet="abc /:", max_size=20))
def test_capability_never_survives_the_rewriter(before, after):
    rewrite = NameRewriter("127.0.0.1:5000", "c0ffee")
    for part in ("c0ffee", "127.0.0.1:5000/c0ffee/cache:import", "127.0.0.1:5000/c0ffee"):
        assert "c0ffee" not in rewrite(before + part + after)
    assert rewrite(before) == before
    assert rewrite.response({"a-c0ffee": "x", "b": "c0ffee"}) == {"b": "***"}


@pytest.mark.parametrize(
    "error",
    [
        ContextChangedError, ContextError, NodeLostError, QuotaExceededError, BuildCanceledError,
        RegistryAuthError, BuildFailedError,
    ],
)  # fmt: skip
def test_errors_survive_the_way_through_a_result(error):
    back = error_of(failure_of(error("why")))
    assert type(back) is error
    assert back.message == "why"


def test_other_errors_become_the_nearest_kind():
    assert type(error_of(failure_of(QueueTimeoutError("x")))) is QuotaExceededError
    assert type(error_of(failure_of(InternalError("x")))) is BuildFailedError
    assert error_of(Success()) is None


def vertex(name: str, word: str = "", error: str = "") -> Vertex:
    found = Vertex(name=name, digest=name, error=error)
    if word != "waits":
        found.started_at.FromSeconds(1)
    if word in ("done", "cached") or error:
        found.completed_at.FromSeconds(2)
    found.cached = word == "cached"
    return found


def batch(*vertices: Vertex, logs: tuple[str, ...] = ()) -> ProgressBatch:
    return ProgressBatch(
        vertices=vertices,
        logs=[VertexLog(vertex=name, data=b"x") for name in logs],
        statuses=[VertexStatus(vertex=item.digest, id="s") for item in vertices],
    )


def test_only_numbered_steps_count():
    tally = StepTally()
    tally.add(
        batch(
            vertex("[1/3] FROM x", "done"),
            vertex("[build 2/3] RUN y", "done"),
            vertex("[linux/arm64 build 3/3] COPY z", "cached"),
            vertex("[linux/arm64 internal] load metadata", "done"),
            vertex("[internal] load build context", "done"),
            vertex("[auth] library/x:pull", "done"),
            vertex("[context extra] load from client", "done"),
            vertex("exporting to image", "done"),
            vertex("[4/4] RUN runs"),
        )
    )
    assert (tally.total, tally.cached) == (2, 1)


def test_step_that_ran_in_any_attempt_is_not_cached():
    tally = StepTally()
    tally.begin_attempt()
    tally.add(batch(vertex("[1/2] a", "cached"), vertex("[2/2] b", "done")))
    tally.begin_attempt()
    tally.add(batch(vertex("[1/2] a", "done"), vertex("[2/2] b", "cached")))
    assert (tally.total, tally.cached) == (2, 0)


def test_step_that_is_told_under_two_digests_counts_once():
    tally = StepTally()
    shared = [vertex("[2/2] b", "done"), vertex("[2/2] b", "cached")]
    shared[1].digest = "that of a build beside it"
    tally.add(batch(vertex("[1/2] a", "cached"), *shared))
    assert (tally.total, tally.cached) == (2, 1)
    first, second = tally.times("definition")
    assert (first.milliseconds, second.milliseconds, second.cached) == (1000, 1000, False)


def shown(progress: RepeatFilter, item: ProgressBatch) -> list[tuple[str, bool, str]]:
    progress.apply(item)
    return [(v.name, v.HasField("completed_at"), v.error) for v in item.vertices]


FAULT = "failed to copy: could not fetch content descriptor sha256:" + "0" * 64 + ": not found"


def test_single_attempt_is_shown_as_it_is():
    progress = RepeatFilter()
    progress.begin_attempt(last=True)
    item = batch(vertex("a", "done"), vertex("a"), vertex("b", error=FAULT), logs=("a",))
    expected = ProgressBatch.FromString(item.SerializeToString())
    progress.apply(item)
    assert item == expected


def test_repaired_fault_is_not_shown_and_finished_steps_are_not_told_again():
    progress = RepeatFilter()
    progress.begin_attempt(last=False)
    assert shown(progress, batch(vertex("a", "done"), vertex("b"))) == [
        ("a", True, ""),
        ("b", False, ""),
    ]
    faults = batch(vertex("b", error=FAULT), vertex("c", error="context canceled"))
    assert shown(progress, faults) == [("b", False, ""), ("c", False, "")]
    progress.begin_attempt(last=True)
    again = batch(vertex("a"), vertex("a", "done"), vertex("b", "done"))
    assert shown(progress, again) == [("b", True, "")]
    assert [status.vertex for status in again.statuses] == ["b"]


def test_step_that_runs_after_all_is_told_from_its_first_output_on():
    progress = RepeatFilter()
    progress.begin_attempt(last=False)
    shown(progress, batch(vertex("a", "cached")))
    progress.begin_attempt(last=True)
    assert shown(progress, batch(vertex("a"))) == []
    assert shown(progress, batch(logs=("a",))) == [("a", False, "")]
    assert shown(progress, batch(vertex("a", "done"))) == [("a", True, "")]


def test_final_and_other_errors_are_shown():
    progress = RepeatFilter()
    progress.begin_attempt(last=False)
    shown(progress, batch(vertex("a", "cached")))
    other = batch(vertex("b", error="exit code: 1"), vertex("c", error="context canceled"))
    assert [error for *_, error in shown(progress, other)] == ["exit code: 1", "context canceled"]
    progress.begin_attempt(last=True)
    assert shown(progress, batch(vertex("a", error=FAULT))) == [("a", True, FAULT)]


def test_builds_of_one_dockerfile_are_alike_where_only_the_directory_has_a_name():
    def found(data: bytes, **values) -> str:
        files = [InlineFile(local_name="dockerfile", path="Dockerfile", data=data)]
        return likeness(spec(**values), files, "linux/amd64")

    one = found(b"FROM a", definition="x", definition_is_name=True)
    assert one
    assert one == found(b"FROM a", definition="y", definition_is_name=True)
    assert one != found(b"FROM b", definition="x", definition_is_name=True)
    assert one != found(b"FROM a", definition="x", definition_is_name=True, target="t")
    assert found(b"FROM a", definition="x") == ""


def timed(name: str, milliseconds: int, *, cached: bool = False, error: str = "") -> Vertex:
    found = Vertex(digest=f"{name}-{milliseconds}", name=name, cached=cached, error=error)
    found.started_at.FromMilliseconds(1000)
    found.completed_at.FromMilliseconds(1000 + milliseconds)
    return found


def test_steps_are_told_by_name_with_their_time():
    ran, hit = StepTally(), StepTally()
    ran.add(batch(timed("[1/2] a", 700), timed("[2/2] b", 30), timed("exporting", 9)))
    hit.add(batch(timed("[1/2] a", 0, cached=True), timed("[2/2] b", 40, error="exit code 1")))
    first, second = ran.times("definition")
    assert (first.milliseconds, second.milliseconds, first.cached) == (700, 30, False)
    (again,) = hit.times("definition")
    assert (again.key, again.cached) == (first.key, True)
    assert hit.times("another")[0].key != first.key
