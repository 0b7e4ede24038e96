"""The answer to --call, printed as buildx prints it.

Source: docker/buildx commands/build.go (printResult); BuildKit frontend/subrequests/lint.
"""

from __future__ import annotations

import base64
import json
import posixpath
from typing import TYPE_CHECKING, Any

from offload_client.progress.excerpt import source_excerpt
from offload_core.errors import BuildFailedError, InternalError
from offload_proto.v1.events_pb2 import SourceRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.build.callrequest import CallRequest

JSON, TEXT, STATUS = "result.json", "result.txt", "result.statuscode"


def dockerfile_title(path: str, file: str) -> str:
    """Return how findings name the Dockerfile of a command line."""
    if file == "-":
        return "stdin"
    return file or posixpath.normpath(posixpath.join(path, "Dockerfile"))


def call_output(
    request: CallRequest, notes: Mapping[str, bytes], dockerfile: str
) -> tuple[str, BuildFailedError | None]:
    """Return what goes to standard output, and how the command ends.

    Args:
        request: what was asked.
        notes: what the frontend answered.
        dockerfile: the name of the Dockerfile for people.

    Raises:
        InternalError: the answer cannot be read.
    """
    answer = {name: value.decode("utf-8", "replace") for name, value in notes.items()}
    if request.name == "lint":
        text, error = _lint(answer, dockerfile, as_json=request.format == "json")
    elif request.format == "json" or TEXT not in answer:
        text, error = f"{answer.get(JSON, '')}\n", None
    else:
        text, error = answer[TEXT], None
    if error is None and not request.ignore_status and answer.get(STATUS, "0") not in ("", "0"):
        error = BuildFailedError("the call has findings")
        error.shown = True
    return text, error


def _lint(
    answer: Mapping[str, str], dockerfile: str, *, as_json: bool
) -> tuple[str, BuildFailedError | None]:
    try:
        found: dict[str, Any] = json.loads(answer.get(JSON, "{}"))
        warnings = _sorted(found)
        parts = [] if as_json else [_headline(len(warnings))]
        failure = found.get("buildError")
        if not as_json:
            parts += [_warning(warning, found, dockerfile) for warning in warnings]
        error = None
        if failure:
            excerpt = _excerpt(failure.get("location"), found, dockerfile)
            error = BuildFailedError(f"{failure['message']}\n{excerpt}".rstrip("\n"))
            parts.append("\n" if warnings and not as_json else "")
        elif not warnings and not as_json:
            parts.append("Check complete, no warnings found.\n")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as fault:
        raise InternalError(f"the findings cannot be read: {fault}") from fault
    return (f"{answer.get(JSON, '')}\n" if as_json else "") + "".join(parts), error


def _headline(count: int) -> str:
    if not count:
        return ""
    number = "1 warning has" if count == 1 else f"{count} warnings have"
    return f"Check complete, {number} been found!\n"


def _sorted(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the warnings by file and line; those without a place come first, by their rule."""

    def key(warning: Mapping[str, Any]) -> tuple[Any, ...]:
        place = warning.get("location") or {}
        source = place.get("sourceIndex", 0)
        spans = place.get("ranges") or []
        if source < 0 or not spans:
            return (source >= 0, "", 0, warning["ruleName"])
        return (True, found["sources"][source].get("filename", ""), _line(spans[0], "start"), "")

    return sorted(found.get("warnings") or [], key=key)


def _warning(warning: Mapping[str, Any], found: Mapping[str, Any], dockerfile: str) -> str:
    link = f" - {warning['url']}" if warning.get("url") else ""
    excerpt = _excerpt(warning.get("location"), found, dockerfile)
    return f"\nWARNING: {warning['ruleName']}{link}\n{warning.get('detail', '')}\n{excerpt}"


def _excerpt(place: Mapping[str, Any] | None, found: Mapping[str, Any], dockerfile: str) -> str:
    index = (place or {}).get("sourceIndex", 0)
    if place is None or index < 0:
        return ""
    source = found["sources"][index]
    return source_excerpt(
        dockerfile or source.get("filename", ""),
        base64.b64decode(source.get("data") or ""),
        _ranges(place.get("ranges") or ()),
    )


def _ranges(spans: Sequence[Mapping[str, Any]]) -> list[SourceRange]:
    return [
        SourceRange(start_line=_line(span, "start"), end_line=_line(span, "end")) for span in spans
    ]


def _line(span: Mapping[str, Any], end: str) -> int:
    return int((span.get(end) or {}).get("line", 0))
