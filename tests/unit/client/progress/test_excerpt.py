from __future__ import annotations

import pytest

from offload_client.progress.excerpt import failure_report, source_excerpt, warnings_report
from offload_proto.v1.events_pb2 import SourceRange, VertexWarning
from offload_proto.v1.node_service_pb2 import Failure

SOURCE = b"FROM scratch\nCOPY a /a\n\nRUN one && \\\n    two\nRUN three\n"


def spans(*lines: tuple[int, int]) -> list[SourceRange]:
    return [SourceRange(start_line=start, end_line=end) for start, end in lines]


def test_a_single_line_has_two_lines_around_it() -> None:
    assert source_excerpt("Dockerfile", SOURCE, spans((6, 6))) == (
        "Dockerfile:6\n"
        "--------------------\n"
        "   4 |     RUN one && \\\n"
        "   5 |         two\n"
        "   6 | >>> RUN three\n"
        "   7 |     \n"
        "--------------------\n"
    )


def test_several_lines_have_one_line_around_them() -> None:
    assert source_excerpt("Dockerfile", SOURCE, spans((4, 5))) == (
        "Dockerfile:4\n"
        "--------------------\n"
        "   3 |     \n"
        "   4 | >>> RUN one && \\\n"
        "   5 | >>>     two\n"
        "   6 |     RUN three\n"
        "--------------------\n"
    )


def test_only_the_lines_of_the_ranges_are_marked() -> None:
    text = source_excerpt("Dockerfile", SOURCE, spans((1, 1), (4, 4)))
    assert [line[:5] for line in text.splitlines() if ">>>" in line] == ["   1 ", "   4 "]


def test_the_first_line_and_windows_line_ends() -> None:
    text = source_excerpt("D", b"FROM x\r\nRUN y\r\n", spans((1, 0)))
    assert text.splitlines()[2] == "   1 | >>> FROM x"


@pytest.mark.parametrize("ranges", [[], spans((0, 0)), spans((99, 99))])
def test_no_excerpt_where_no_line_is_meant(ranges: list[SourceRange]) -> None:
    assert source_excerpt("Dockerfile", SOURCE, ranges) == ""


def test_a_failed_build_says_failed_to_solve_once() -> None:
    failure = Failure(
        kind=Failure.KIND_BUILD,
        message='process "/bin/sh -c x" did not complete successfully: exit code: 1',
        source_filename="Dockerfile",
        source_data=SOURCE,
        source_ranges=spans((2, 2)),
    )
    text = failure_report(failure).decode()
    assert text.startswith("Dockerfile:2\n")
    error = 'process "/bin/sh -c x" did not complete successfully: exit code: 1'
    assert text.endswith(f"\nERROR: failed to build: failed to solve: {error}\n")
    failure.message = f"failed to solve: {failure.message}"
    assert failure_report(failure).decode() == text


@pytest.mark.parametrize("kind", [Failure.KIND_CANCELED, Failure.KIND_NODE, Failure.KIND_CONTEXT])
def test_other_failures_are_told_as_they_are(kind: Failure.Kind.ValueType) -> None:
    report = failure_report(Failure(kind=kind, message="the node went away"))
    assert report == b"ERROR: the node went away\n"


def warning(short: str, vertex: str = "a") -> VertexWarning:
    return VertexWarning(
        vertex=vertex,
        short=short.encode(),
        detail=[b"Because."],
        url="https://example.org/rule",
        source_filename="Dockerfile",
        source_data=SOURCE,
        ranges=spans((2, 2)),
    )


def test_warnings_are_listed_once_each() -> None:
    headline, lines = warnings_report(
        [warning("one"), warning("two"), warning("one", "b")], expand=False
    )
    assert headline == " 2 warnings found (use --debug to expand):"
    assert lines == " - one\n - two\n"
    assert warnings_report([warning("one")], expand=False)[0] == (
        " 1 warning found (use --debug to expand):"
    )


def test_expanded_warnings_show_the_place() -> None:
    headline, lines = warnings_report([warning("one")], expand=True)
    assert headline == " 1 warning found:"
    assert lines.startswith(" - one\nBecause.\nMore info: https://example.org/rule\nDockerfile:2\n")
    assert "   2 | >>> COPY a /a\n" in lines


def test_no_warnings_no_list() -> None:
    assert warnings_report([], expand=True) == ("", "")
