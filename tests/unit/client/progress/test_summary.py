"""The summary is short, and says nothing that is not so."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from offload_client.progress.display import make_display
from offload_client.progress.model import BuildView
from offload_client.progress.summary import Totals, summary_lines
from offload_proto.v1.builds_service_pb2 import BuildStats
from offload_proto.v1.node_service_pb2 import Failure
from tests.unit.client.progress.recorded import Scribe

scribe = Scribe()
EVERYTHING = Totals(
    steps=7,
    cached=5,
    context_bytes=350_000_000,
    context_sent_bytes=1_200_000,
    context_wire_bytes=400_000,
    loaded=True,
    loaded_layers=1,
    reused_layers=11,
    loaded_bytes=12_300_000,
)


def built(*steps: tuple[str, float, float]) -> BuildView:
    view = BuildView(0.0)
    for number, (name, start, end) in enumerate(steps):
        view.apply(scribe.vertex(str(number), name, start=start, end=end), end)
    return view


def test_everything_in_two_lines() -> None:
    view = built(
        ("[internal] load metadata for docker.io/library/alpine:3", 0, 0.5),
        ("[internal] load build context", 0.5, 2),
        ("[base 1/2] FROM docker.io/library/alpine:3", 0.5, 1),
        ("[base 2/2] RUN apk add gcc", 1, 9),
        ("[build 1/2] RUN make", 9, 37),
        ("exporting to image", 37, 42),
    )
    saved, times = summary_lines(view, EVERYTHING, 42.25)
    assert saved == (
        "[offload] 5 of 7 steps cached; context 350MB, 1.2MB sent in 400kB; "
        "1 of 12 layers loaded (12.3MB)"
    )
    assert times == (
        "[offload] 42.2s: steps 36.0s (longest: [build 1/2] RUN make, 28.0s), export 5.0s, "
        "context 1.5s, base images 1.0s"
    )


def test_steps_side_by_side_count_once() -> None:
    view = built(("[a 1/1] RUN a", 0, 10), ("[b 1/1] RUN b", 5, 12))
    assert summary_lines(view, Totals(steps=2), 12.0)[1] == (
        "[offload] 12.0s: steps 12.0s (longest: [a 1/1] RUN a, 10.0s)"
    )


def test_a_short_build_is_one_line() -> None:
    view = built(("[1/1] RUN true", 0, 0.4))
    totals = Totals(steps=1, cached=1, context_bytes=1000, loaded=True, reused_layers=3)
    assert summary_lines(view, totals, 0.5) == [
        "[offload] 1 of 1 step cached; context 1kB, nothing sent; image unchanged"
    ]


def test_a_build_of_which_nothing_is_known_has_no_summary() -> None:
    assert summary_lines(BuildView(0.0), Totals(), 0.5) == []


@given(
    spans=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=12),
    sent=st.integers(0, 10**9),
    wire=st.integers(0, 10**9),
)
def test_it_is_never_more_than_two_lines_and_no_part_exceeds_the_time(
    spans: list[tuple[int, int]], sent: int, wire: int
) -> None:
    steps = [
        (f"[{number}/{len(spans)}] RUN x", min(a, b), max(a, b))
        for number, (a, b) in enumerate(spans)
    ]
    totals = Totals(10, 3, 10**6, sent, wire)
    lines = summary_lines(built(*steps), totals, 101.0)
    assert 1 <= len(lines) <= 2
    assert "\n" not in "".join(lines)
    for line in lines[1:]:
        assert float(line.partition("steps ")[2].partition("s")[0]) <= 100.0


def test_plain_shows_it_last_and_quiet_and_rawjson_do_not() -> None:
    for mode, shown in (("plain", True), ("quiet", False), ("rawjson", False)):
        stream = io.BytesIO()
        display = make_display(mode, stream, {})
        display.feed(scribe.vertex("a", "[1/1] RUN a", start=0, end=0.5))
        display.finish(None, Totals.of(BuildStats(steps_total=1, steps_cached=1)))
        text = stream.getvalue().decode()
        assert text.endswith("[offload] 1 of 1 step cached\n") is shown
        assert ("[offload]" in text) is shown


def test_failed_build_has_it_before_its_error() -> None:
    for mode, shown in (("plain", True), ("quiet", False), ("rawjson", False)):
        stream = io.BytesIO()
        display = make_display(mode, stream, {})
        display.finish(Failure(message="no"), Totals(steps=3, cached=1))
        text = stream.getvalue().decode()
        error = "ERROR: failed to build: failed to solve: no\n"
        assert text == ("[offload] 1 of 3 steps cached\n" if shown else "") + error


def test_build_that_failed_before_its_steps_has_none() -> None:
    stream = io.BytesIO()
    display = make_display("plain", stream, {})
    display.finish(Failure(message="no"), Totals())
    assert b"[offload]" not in stream.getvalue()
