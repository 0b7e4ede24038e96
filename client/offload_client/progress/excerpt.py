"""What is said at the end: why a build failed, and what its warnings were."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_client.progress.step import Step
    from offload_proto.v1.events_pb2 import SourceRange, VertexWarning
    from offload_proto.v1.node_service_pb2 import Failure

_RULE = "-" * 20
_STEP_RULE = "-" * 6
_SOLVE = "failed to solve: "
_BUILD = "failed to build: "
# Failure.Kind, node_service.proto: these carry BuildKit's message, which its clients introduce
# with "failed to solve", and buildx with "failed to build" before it.
_SOLVE_KINDS = (0, 1)


def step_excerpt(step: Step, lines: Iterable[bytes]) -> bytes:
    """Return the name of a failed step and its last output between dashes."""
    head = f"{_STEP_RULE}\n > {step.title}:\n".encode("utf-8", "replace")
    return b"".join([head, *(line + b"\n" for line in lines), f"{_STEP_RULE}\n".encode()])


def source_excerpt(filename: str, data: bytes, ranges: Sequence[SourceRange]) -> str:
    """Return the lines of a file that a message is about, marked, with a few around them.

    Returns:
        Whole lines; empty when no range lies in the file.
    """
    lines = [line.rstrip("\r") for line in data.decode("utf-8", "replace").split("\n")]
    spans = [(span.start_line, max(span.start_line, span.end_line)) for span in ranges]
    if not spans:
        return ""
    first = min(start for start, _ in spans)
    last = min(max(end for _, end in spans), len(lines))
    if not 1 <= first <= len(lines):
        return ""
    # A single line needs more around it to be recognised.
    around = 2 if first == last else 1
    text = [f"{filename}:{first}", _RULE]
    for number in range(max(1, first - around), min(len(lines), last + around) + 1):
        mark = ">>>" if any(start <= number <= end for start, end in spans) else "   "
        text.append(f" {number:3d} | {mark} {lines[number - 1]}")
    text.append(_RULE)
    return "\n".join(text) + "\n"


def failure_report(failure: Failure) -> bytes:
    """Return the excerpt of the Dockerfile and the final error line."""
    text = ""
    if failure.source_data:
        text = source_excerpt(failure.source_filename, failure.source_data, failure.source_ranges)
    message = failure.message or "the build failed"
    if failure.kind in _SOLVE_KINDS:
        message = _BUILD + _SOLVE + message.removeprefix(_SOLVE)
    return f"{text}ERROR: {message}\n".encode("utf-8", "replace")


def warnings_report(warnings: Iterable[VertexWarning], *, expand: bool) -> tuple[str, str]:
    """Return the list of warnings as a headline and its lines, both empty when there are none.

    A finding that several steps reported is listed once.

    Args:
        warnings: in the order in which they came.
        expand: give the details, the link and the lines of the file too.
    """
    distinct = distinct_warnings(warnings)
    if not distinct:
        return "", ""
    plural = "s" if len(distinct) > 1 else ""
    hint = "" if expand else " (use --debug to expand)"
    headline = f" {len(distinct)} warning{plural} found{hint}:"
    lines = []
    for warning in distinct:
        lines.append(f" - {_text(warning.short)}\n")
        if not expand:
            continue
        lines += [f"{_text(detail)}\n" for detail in warning.detail]
        if warning.url:
            lines.append(f"More info: {warning.url}\n")
        lines.append(source_excerpt(warning.source_filename, warning.source_data, warning.ranges))
        lines.append("\n")
    return headline, "".join(lines)


def distinct_warnings(warnings: Iterable[VertexWarning]) -> list[VertexWarning]:
    """Return each finding once, in the order in which they came."""
    distinct: dict[tuple[object, ...], VertexWarning] = {}
    for warning in warnings:
        spans = tuple((span.start_line, span.end_line) for span in warning.ranges)
        key = (warning.short, warning.url, warning.source_filename, spans, *warning.detail)
        distinct.setdefault(key, warning)
    return list(distinct.values())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
