"""What is shown of a lost run and of the one that repeats it."""

from __future__ import annotations

import io
import json
import re

import pytest

from offload_client.progress.attempts import StepNames
from offload_client.progress.display import make_display
from offload_client.progress.model import BuildView
from offload_proto.v1.events_pb2 import ProgressBatch
from tests.unit.client.progress.recorded import Scribe

scribe = Scribe()
TEXT = "node one was lost; what follows is a new run"


def run_twice(mode: str) -> str:
    stream = io.BytesIO()
    display = make_display(mode, stream, {})
    for run in (0, 1):
        names = StepNames(run)
        feed = display.feed
        feed(names.batch(scribe.vertex("sha256:a", "[1/2] RUN one", start=0, end=1)))
        feed(names.batch(scribe.vertex("sha256:b", "[2/2] RUN two", start=1)))
        feed(names.batch(scribe.log("sha256:b", f"of run {run}\n".encode(), 2)))
        if not run:
            over = scribe.vertex("sha256:b", "[2/2] RUN two", start=1, end=2)
            over.vertices[0].error = "context canceled"
            feed(names.batch(over))
            display.begin_again(TEXT)
        else:
            feed(names.batch(scribe.vertex("sha256:b", "[2/2] RUN two", start=1, end=2)))
    display.finish(None)
    return stream.getvalue().decode()


def test_plain_shows_the_lost_run_before_the_remark_and_the_new_one_after() -> None:
    first, remark, second = run_twice("plain").partition(f"WARNING: {TEXT}\n")
    assert remark
    assert "of run 0" in first and "CANCELED" in first
    assert "of run 1" in second and "of run 0" not in second
    numbers = [re.findall(r"^#(\d+) \[", text, re.MULTILINE) for text in (first, second)]
    assert numbers == [["1", "2"], ["3", "4"]]


def test_rawjson_has_other_steps_for_the_new_run() -> None:
    lines = [json.loads(line) for line in run_twice("rawjson").splitlines()]
    steps = {
        vertex["digest"]
        for line in lines
        for vertex in line.get("vertexes", ())
        if "RUN" in vertex["name"]
    }
    assert len(steps) == 4
    assert all(step.startswith("sha256:") for step in steps)
    logs = [log["vertex"] for line in lines for log in line.get("logs", ())]
    assert len(set(logs)) == 2 and set(logs) <= steps


def test_view_forgets_the_lost_run_and_the_clock_of_its_node() -> None:
    view = BuildView(0.0)
    view.apply(scribe.vertex("a", "[1/2] RUN one", start=5000), 1.0)
    view.begin_again()
    assert view.counts() == (0, 0)
    assert not view.shown
    # The clock of the next node is an hour behind.
    view.apply(scribe.vertex("b", "[1/2] RUN one", start=1000), 2.0)
    assert view.elapsed_seconds(3.0) == pytest.approx(3.0)


def test_first_run_keeps_its_names_and_batches_are_not_changed() -> None:
    batch = scribe.vertex("sha256:a", "[1/2] RUN one", start=0)
    assert StepNames(0).batch(batch) is batch
    before = ProgressBatch.FromString(batch.SerializeToString())
    assert StepNames(1).batch(batch).vertices[0].digest != "sha256:a"
    assert batch == before
