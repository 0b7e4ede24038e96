from __future__ import annotations

import pytest

from offload_client.progress.model import BuildView
from offload_client.progress.step import format_bytes
from offload_proto.v1.events_pb2 import ProgressBatch
from tests.unit.client.progress.recorded import START_NS, Scribe, batches

scribe = Scribe()


def view_of(*news: ProgressBatch, now: float = 0.0) -> BuildView:
    view = BuildView(now)
    for batch in news:
        view.apply(batch, now)
    return view


def test_a_repeated_announcement_does_not_undo_a_start() -> None:
    view = view_of(
        scribe.vertex("a"), scribe.vertex("a", start=1, end=2, cached=True), scribe.vertex("a")
    )
    assert view.steps["a"].completed
    assert view.steps["a"].cached


def test_first_start_and_last_end_are_kept() -> None:
    view = view_of(
        scribe.vertex("a", start=1),
        scribe.vertex("a", start=1, end=2),
        scribe.vertex("a", start=5),
    )
    step = view.steps["a"]
    assert step.running
    assert step.completed_ns is None
    view.apply(scribe.vertex("a", start=5, end=6), 0.0)
    assert (step.started_ns, step.completed_ns) == (START_NS + 10**9, START_NS + 6 * 10**9)
    assert step.done_seconds() == 2.0


def test_overlapping_runs_count_once() -> None:
    view = view_of(
        scribe.vertex("a", start=0, end=4),
        scribe.vertex("a", start=1, end=3),
        scribe.vertex("a", start=3.5, end=5),
    )
    assert view.steps["a"].done_seconds() == 5.0


def test_counters_of_two_steps_with_one_id_are_two() -> None:
    view = view_of(
        scribe.vertex("a", start=0),
        scribe.vertex("b", start=0),
        scribe.counter("a", "layer", 1, 10),
        scribe.counter("b", "layer", 7, 10),
        scribe.counter("a", "layer", 2, 10),
    )
    assert [view.steps[key].counters["layer"].current for key in "ab"] == [2, 7]


def test_a_running_step_is_timed_from_when_it_was_heard_of() -> None:
    view = BuildView(100.0)
    view.apply(scribe.vertex("a", start=0), 100.0)
    step = view.steps["a"]
    assert step.seconds(103.0, view.node_now(103.0)) == pytest.approx(3.0)
    assert view.elapsed_seconds(103.0) == pytest.approx(3.0)


def test_a_build_that_is_attached_to_late_shows_how_long_it_has_run() -> None:
    view = BuildView(100.0)
    view.apply(scribe.vertex("a", start=0), 100.0)
    view.apply(scribe.log("a", b"x\n", 60.0), 100.1)
    for now, seconds in ((100.1, 60.0), (101.1, 61.0), (200.1, 160.0)):
        assert view.steps["a"].seconds(now, view.node_now(now)) == pytest.approx(seconds)
        assert view.elapsed_seconds(now) == pytest.approx(seconds)
    view.apply(scribe.log("a", b"late\n", 61.0), 105.0)
    assert view.elapsed_seconds(105.0) == pytest.approx(64.9)


def test_clocks_of_client_and_node_are_not_mixed() -> None:
    view = BuildView(0.0)
    view.apply(scribe.vertex("local", start=10_000), 0.0, local=True)
    view.apply(scribe.vertex("a", start=0), 0.0)
    assert view.elapsed_seconds(1.0) == pytest.approx(1.0)
    assert view.steps["a"].seconds(1.0, view.node_now(1.0)) == pytest.approx(1.0)


def test_members_of_a_group_are_one_step() -> None:
    group = {"progress_group": "g", "progress_group_name": "COPY --link"}
    view = view_of(
        scribe.vertex("a", start=0, end=1, cached=True, **group),
        scribe.vertex("b", start=1, **group),
        scribe.counter("b", "merging", 1),
    )
    (step,) = view.shown
    assert (step.name, step.running, step.cached, list(step.counters)) == (
        "COPY --link",
        True,
        False,
        ["merging"],
    )
    assert view.counts() == (0, 1)
    view.apply(scribe.vertex("b", start=1, end=3, error="no", **group), 0.0)
    assert (step.done_seconds(), step.error, view.counts()) == (3.0, "no", (1, 1))


def test_a_weak_group_is_hidden_until_something_in_it_matters() -> None:
    weak = {"progress_group": "g", "progress_group_weak": True}
    view = view_of(scribe.vertex("a", start=0, **weak))
    assert view.shown == []
    assert view.counts() == (0, 0)
    view.apply(scribe.vertex("b", start=1, progress_group="g"), 0.0)
    assert [step.digest for step in view.shown] == ["g"]


def test_news_are_given_once() -> None:
    view = view_of(scribe.vertex("a", start=0), scribe.log("a", b"1\n"), scribe.log("a", b"2\n"))
    assert view.take_news() == {"a": 3}
    assert view.take_news() == {}


def test_a_repeated_message_is_no_news() -> None:
    view = view_of(scribe.vertex("a", start=0, end=1))
    view.take_news()
    view.apply(scribe.vertex("a", start=0, end=1), 0.0)
    assert view.take_news() == {}


def test_empty_output_is_no_news() -> None:
    assert view_of(scribe.log("a", b"")).take_news() == {}


def test_recorded_build_is_complete_at_its_end() -> None:
    view = view_of(*batches("parallel"))
    assert view.counts() == (13, 13)
    assert len(view.warnings) == 3
    assert all(step.completed for step in view.shown)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1.00kB"),
        (1_982_653, "1.98MB"),
        (3 * 10**9, "3.00GB"),
        (10**18, "1.00EB"),
    ],
)
def test_bytes_are_written_as_buildkit_does(amount: int, text: str) -> None:
    assert format_bytes(amount) == text
