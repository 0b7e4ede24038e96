"""Why a step ran, from two traces."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from offload_builder.node.why.explain import CacheFacts, Comparison, explain
from offload_builder.node.why.trace import BuildTrace, TracedSource, TracedStep
from offload_core.errors import UsageError
from offload_proto.v1.cache_service_pb2 import StepReason

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
DOCKERFILE = """\
FROM base AS build
ARG VERSION
ENV MODE=fast
COPY src /src
RUN make
FROM build
COPY other /other
"""
NAMES = (
    "[build 1/3] FROM docker.io/library/base:1@sha256:aa",
    "[build 2/3] COPY src /src",
    "[build 3/3] RUN make",
    "[stage-1 1/1] COPY other /other",
)


def steps(*ran: int, names: tuple[str, ...] = NAMES) -> tuple[TracedStep, ...]:
    """Return the steps of a build in a row; those numbered ran."""
    return tuple(
        TracedStep(name, f"d{number}", (f"d{number - 1}",) if number else (), number not in ran,
                   ended=True, seconds=1.5 if number in ran else 0.0)
        for number, name in enumerate(names)
    )  # fmt: skip


BEFORE = BuildTrace(
    build_id="one",
    key="app",
    member="ali",
    node_id="n1",
    created_at=AT,
    ended_at=AT + timedelta(minutes=1),
    dockerfile=DOCKERFILE,
    read_scopes=("p/main",),
    write_scope="p/main",
    steps=steps(0, 1, 2, 3),
    sources=(TracedSource("context", ("aa",)),),
)
NOW = replace(
    BEFORE,
    build_id="two",
    created_at=AT + timedelta(hours=1),
    ended_at=AT + timedelta(hours=2),
    steps=steps(1, 2, 3),
)


def kinds(comparison: Comparison, wanted: str = "") -> list[tuple[str, str]]:
    return [
        (StepReason.Kind.Name(reason.kind).removeprefix("KIND_"), " ".join(reason.details))
        for reason in explain(comparison, wanted)
    ]


def test_changed_files_are_named_and_the_rest_follows() -> None:
    comparison = Comparison(
        NOW, BEFORE, {"context": {"src/a.c": "changed", "src/b.c": "added", "doc": "changed"}}
    )
    assert kinds(comparison) == [
        ("FILES_CHANGED", "src/a.c src/b.c (added)"),
        ("EARLIER_STEP", ""),
        ("EARLIER_STEP", ""),
    ]


def test_files_that_a_step_does_not_take_in_are_no_reason() -> None:
    comparison = Comparison(NOW, BEFORE, {"context": {"doc": "changed"}})
    assert kinds(comparison)[0][0] == "UNKNOWN"


def test_many_files_are_counted() -> None:
    changes = {f"src/{number}": "changed" for number in range(50)}
    reason = explain(Comparison(NOW, BEFORE, {"context": changes}))[0]
    assert (len(reason.details), reason.more_details) == (20, 30)
    assert reason.took.ToMilliseconds() == 1500


def test_environment_counts_for_the_first_run_that_has_it() -> None:
    text = DOCKERFILE.replace("MODE=fast", "MODE=slow")
    now = replace(NOW, dockerfile=text, steps=steps(2, 3))
    assert kinds(Comparison(now, BEFORE))[0] == (
        "TEXT_CHANGED", "ENV MODE=fast -> ENV MODE=slow",
    )  # fmt: skip


def test_own_text_counts_and_a_step_that_only_moved_is_the_same() -> None:
    text = DOCKERFILE.replace("RUN make\n", "RUN make all\n")
    names = (*NAMES[:2], "[build 3/3] RUN make all", NAMES[3])
    now = replace(NOW, dockerfile=text, steps=steps(2, 3, names=names))
    assert kinds(Comparison(now, BEFORE)) == [
        ("TEXT_CHANGED", "RUN make -> RUN make all"), ("EARLIER_STEP", ""),
    ]  # fmt: skip
    text = DOCKERFILE.replace("COPY src", "COPY new /new\nCOPY src")
    names = (
        "[build 1/4] FROM docker.io/library/base:1@sha256:aa", "[build 2/4] COPY new /new",
        "[build 3/4] COPY src /src", "[build 4/4] RUN make", NAMES[3],
    )  # fmt: skip
    now = replace(NOW, dockerfile=text, steps=steps(1, 2, 3, 4, names=names))
    assert [kind for kind, _ in kinds(Comparison(now, BEFORE))] == [
        "TEXT_CHANGED", "EARLIER_STEP", "EARLIER_STEP", "EARLIER_STEP",
    ]  # fmt: skip


def test_argument_is_named_and_its_value_is_not() -> None:
    before = replace(BEFORE, arguments={"VERSION": "x", "UNUSED": "1"})
    now = replace(NOW, arguments={"VERSION": "y", "UNUSED": "2"}, steps=steps(2, 3))
    assert kinds(Comparison(now, before))[0] == ("TEXT_CHANGED", "--build-arg VERSION")


def test_step_that_is_gone_or_moved_is_the_reason_for_those_after_it() -> None:
    text = "FROM base\nRUN one\nRUN two\nENV A=1\nRUN three\n"
    names = ("[1/4] FROM x@sha256:aa", "[2/4] RUN one", "[3/4] RUN two", "[4/4] RUN three")
    before = replace(BEFORE, dockerfile=text, steps=steps(names=names))
    gone = ("[1/3] FROM x@sha256:aa", "[2/3] RUN one", "[3/3] RUN three")
    now = replace(NOW, dockerfile=text.replace("RUN two\n", ""), steps=steps(2, names=gone))
    assert kinds(Comparison(now, before)) == [("TEXT_CHANGED", "RUN two is gone")]
    swapped = (names[0], "[2/4] RUN two", "[3/4] RUN one", names[3])
    text = text.replace("RUN one\nRUN two", "RUN two\nRUN one")
    now = replace(NOW, dockerfile=text, steps=steps(1, names=swapped))
    assert kinds(Comparison(now, before)) == [("TEXT_CHANGED", "RUN one is gone")]


def test_base_that_was_fetched_again_is_no_reason() -> None:
    now = replace(NOW, steps=steps(0, 1))
    comparison = Comparison(now, BEFORE, {"context": {"src/a": "changed"}})
    assert kinds(comparison) == [("FILES_CHANGED", "src/a")]
    assert kinds(Comparison(replace(NOW, steps=steps(0)), BEFORE)) == []
    assert kinds(Comparison(replace(NOW, steps=steps(0)), BEFORE), "FROM") == [("CACHED", "")]


def test_files_of_all_bind_mounts_and_of_variables_are_named() -> None:
    run = "RUN --mount=type=bind,source=a.json --mount=type=bind,source=b.json,target=b.json npm ci"
    text = f"FROM base\nARG DIR=src\nCOPY ${{DIR}} /src\n{run}\n"
    names = ("[1/3] FROM x@sha256:aa", "[2/3] COPY src /src", f"[3/3] {run}")
    before = replace(BEFORE, dockerfile=text, steps=steps(names=names))
    now = replace(before, build_id="two", steps=steps(2, names=names))
    comparison = Comparison(now, before, {"context": {"b.json": "changed"}})
    assert kinds(comparison) == [("FILES_CHANGED", "b.json")]
    now = replace(now, steps=steps(1, names=names))
    comparison = Comparison(now, before, {"context": {"src/x": "added"}})
    assert kinds(comparison) == [("FILES_CHANGED", "src/x (added)")]


def test_base_that_moved() -> None:
    names = (NAMES[0].replace("aa", "bb"), *NAMES[1:])
    now = replace(NOW, steps=steps(0, 1, 2, 3, names=names))
    assert kinds(Comparison(now, BEFORE))[0] == ("BASE_MOVED", "sha256:aa -> sha256:bb")


def test_nothing_before() -> None:
    assert {kind for kind, _ in kinds(Comparison(NOW))} == {"NEW"}


def test_no_cache() -> None:
    assert {kind for kind, _ in kinds(Comparison(replace(NOW, no_cache=True), BEFORE))} == {
        "NOT_WANTED"
    }


@pytest.mark.parametrize(
    ("changes", "facts", "kind"),
    [
        ({"faults": 1}, CacheFacts(AT), "FAULT"),
        ({"read_scopes": ()}, CacheFacts(AT), "NOT_WANTED"),
        ({"read_scopes": ("p/feature",)}, CacheFacts(AT), "OTHER_SCOPE"),
        ({}, CacheFacts(AT, AT + timedelta(minutes=30)), "COLLECTED"),
        ({"node_id": "n2"}, CacheFacts(AT + timedelta(hours=3)), "NOT_UPLOADED"),
        ({"node_id": "n2"}, CacheFacts(), "NOT_UPLOADED"),
        ({"withheld": 2}, CacheFacts(AT), "COLLECTED"),
        ({"node_id": "n2"}, CacheFacts(AT), "UNKNOWN"),
    ],
)
def test_when_nothing_differs_it_is_about_the_cache(
    changes: dict[str, object], facts: CacheFacts, kind: str
) -> None:
    now = replace(NOW, **changes)  # type: ignore[arg-type]
    assert kinds(Comparison(now, BEFORE, facts=facts))[0][0] == kind


def test_build_that_was_cached_itself_is_not_said_to_have_uploaded_nothing() -> None:
    before = replace(BEFORE, steps=steps(0))
    comparison = Comparison(replace(NOW, node_id="n2"), before, facts=CacheFacts())
    assert kinds(comparison)[0][0] == "UNKNOWN"


def test_one_step_is_told_of_also_when_it_was_cached() -> None:
    assert kinds(Comparison(NOW, BEFORE), "FROM")[0][0] == "CACHED"
    assert kinds(Comparison(NOW, BEFORE), "3")[0][0] == "EARLIER_STEP"


def test_trace_survives_its_document() -> None:
    assert BuildTrace.from_bytes(NOW.to_bytes()) == NOW
    with pytest.raises(UsageError):
        BuildTrace.from_bytes(b"\x28\xb5\x2f\xfd damaged")
