"""The log of a pipeline: folds, annotations, and nothing that a build can order."""

from __future__ import annotations

import io
import os
import pty
from typing import TYPE_CHECKING

import pytest

from offload_client.ci.foldedprinter import FoldedPrinter
from offload_client.ci.guard import guard_for
from offload_client.ci.orders import Orders
from offload_client.progress.display import make_display
from offload_client.progress.model import BuildView
from offload_client.progress.plain import PlainDisplay
from offload_proto.v1.node_service_pb2 import Failure
from tests.unit.client.ci.test_guard import github_obeys
from tests.unit.client.progress.recorded import Scribe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_proto.v1.events_pb2 import ProgressBatch

SCRIBE = Scribe()
STEP = [
    SCRIBE.vertex("b", "[1/2] FROM base", start=0, end=0, cached=True),
    SCRIBE.vertex("a", "[2/2] RUN make", start=1),
    SCRIBE.log("a", b"compiling\n::add-mask::x\nhalf a ##", 1.5),
    SCRIBE.log("a", b"[set-output name=a]b\n50%\r::error::c\nend", 1.6),
    SCRIBE.vertex("a", "[2/2] RUN make", start=1, end=3),
]


def shown(
    system: str,
    batches: Iterable[ProgressBatch],
    failure: Failure | None = None,
    mode: str = "auto",
    **environment: str,
) -> str:
    """Return what a log has."""
    stream = io.BytesIO()
    variables = {"OFFLOAD_CI": system, **environment}
    with make_display(mode, stream, variables, sources={"Dockerfile": "app/Dockerfile"}) as display:
        for batch in batches:
            display.feed(batch)
        display.finish(failure)
    return stream.getvalue().decode()


def orders(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("::")]


def test_github_folds_output_and_obeys_nothing_of_it() -> None:
    text = shown("github", STEP)
    assert orders(text) == ["::group::#2 output", "::endgroup::"]
    foreign = "\n".join(line for line in text.split("\n") if not line.startswith("::"))
    assert not github_obeys(foreign.encode())
    lines = text.split("\n")
    assert lines.index("#2 [2/2] RUN make") < lines.index("::group::#2 output")
    assert lines.index("::endgroup::") < lines.index("#2 DONE 2.0s")
    assert "end\n" in text
    assert "half a ##\\[set-output" in text


def printed_slowly(pieces: Iterable[bytes]) -> bytes:
    """Return what is printed when each piece of a step's output is shown before the next comes."""
    view = BuildView(0.0)
    printer = FoldedPrinter(
        view, Orders("github"), guard_for("github"), folds=True, truncate_names=False
    )
    done = []
    for batch in (STEP[1], *(SCRIBE.log("a", piece, 2) for piece in pieces), STEP[4]):
        view.apply(batch, 1.0)
        done.append(printer.render(1.0))
    return b"".join([*done, printer.render(2.0, final=True)])


def test_order_in_pieces_of_output_stays_in_one_line() -> None:
    text = printed_slowly([b"x #", b"#", b"[add-mask]y", b"\n"])
    assert b"x ##\\[add-mask]y" in text
    assert b"##[" not in text


def test_long_line_without_an_end_does_not_stay_in_memory() -> None:
    text = printed_slowly([b"." * 100_000] * 3)
    assert text.count(b".") > 300_000
    assert max(map(len, text.splitlines())) < 200_000


def test_gitlab_and_buildkite_fold_in_their_own_ways() -> None:
    gitlab = shown("gitlab", STEP)
    assert "[collapsed=true]\r\x1b[0K#2 output\n" in gitlab
    assert gitlab.count("section_start:") == gitlab.count("section_end:") == 1
    buildkite = shown("buildkite", STEP)
    assert "\n--- #2 [2/2] RUN make\n" in buildkite
    for system in ("circleci", "jenkins", "generic"):
        assert "output" not in shown(system, STEP).replace("set-output", "")


def failed() -> tuple[list[ProgressBatch], Failure]:
    failure = Failure(
        message='process "/bin/sh -c x" failed: 100%\n::set-output name=a::b',
        source_filename="Dockerfile",
        source_data=b"FROM a\nRUN make\n",
    )
    failure.source_ranges.add(start_line=2, end_line=2)
    step = SCRIBE.vertex("a", "[2/2] RUN make", start=1, end=2, error="exit code 1")
    return [STEP[1], SCRIBE.log("a", b"::error::no\n", 1.5), step], failure


def test_failure_and_warnings_are_annotations_at_their_lines() -> None:
    batches, failure = failed()
    warning = SCRIBE.warning(
        "a", "Bad: a, b 50%", detail=[b"line\r::x"], source_filename="Dockerfile"
    )
    warning.warnings[0].ranges.add(start_line=1, end_line=2)
    text = shown("github", [batches[0], warning, warning, *batches[1:]], failure)
    told = orders(text)[-2:]
    assert told[0] == (
        "::error file=app/Dockerfile,line=2,title=Build failed::"
        'process "/bin/sh -c x" failed: 100%25%0A::set-output name=a::b'
    )
    assert told[1].startswith("::warning file=app/Dockerfile,line=1,endLine=2,title=Bad::Bad: a, b")
    assert "50%25%0Aline" in told[1]
    assert len(orders(text)) == 4


def test_buildkite_opens_the_step_that_failed() -> None:
    text = shown("buildkite", *failed())
    assert "\n^^^ +++\n#1 ERROR: exit code 1\n" in text
    assert "\n+++ build failed\n" in text


@pytest.mark.parametrize("mode", ["quiet", "rawjson"])
def test_other_forms_are_safe_too(mode: str) -> None:
    batches, failure = failed()
    batches.append(SCRIBE.vertex("c", "RUN echo ##[add-mask]x", start=1, end=2))
    assert not github_obeys(shown("github", batches, failure, mode).encode())


def test_terminal_of_a_pipeline_gets_plain_lines() -> None:
    primary, secondary = pty.openpty()
    try:
        with open(secondary, "wb", closefd=False, buffering=0) as stream:
            display = make_display("auto", stream, {"BUILDKITE": "true", "TERM": "xterm"})
            assert isinstance(display, PlainDisplay)
            display.finish()
    finally:
        os.close(primary)
        os.close(secondary)


def test_run_that_was_lost_ends_its_fold_and_the_next_has_its_own() -> None:
    stream = io.BytesIO()
    with make_display("auto", stream, {"OFFLOAD_CI": "github"}) as display:
        display.feed(STEP[1])
        display.feed(SCRIBE.log("a", b"first\n", 1.5))
        display.begin_again("node one was lost")
        display.feed(SCRIBE.vertex("other", "[2/2] RUN make", start=5))
        display.feed(SCRIBE.log("other", b"second\n", 5.5))
        display.finish()
    text = stream.getvalue().decode()
    assert orders(text) == [
        "::group::#1 output", "::endgroup::", "::group::#2 output", "::endgroup::",
    ]  # fmt: skip
    assert text.index("::endgroup::") < text.index("WARNING: node one was lost")
