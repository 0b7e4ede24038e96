"""The summary of a build in Markdown, for the page of a pipeline's job.

Everything that comes from the build is escaped: names of steps, warnings and output may hold
anything. Source of the format: GitHub Flavored Markdown; GitHub "Adding a job summary".
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.progress.cells import printable
from offload_client.progress.excerpt import distinct_warnings
from offload_core.units import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.progress.step import Step
    from offload_client.progress.summary import Totals
    from offload_proto.v1.events_pb2 import VertexWarning

MAX_BYTES = 512 << 10
"""GitHub takes 1 MiB for all summaries of one step."""
MAX_STEPS = 300
MAX_WARNINGS = 100
MAX_OUTPUT_CHARACTERS = 20_000
MAX_TEXT_CHARACTERS = 300
# What means something to Markdown or HTML anywhere in a line. Written as an entity, it never does.
_MARKS = re.compile(r"[#$&*:<>@\[\\\]^_`{|}~]|(?<=www)\.", re.IGNORECASE)
# What begins a list or a rule: a number with a point, a dash.
_LEAD = re.compile(r"(?:\d+(?=[.)](?: |$))|(?=[-+=]))(.)")


@dataclass(frozen=True)
class Outcome:
    """What a build came to.

    Attributes:
        title: what was built.
        error: one sentence; empty when it worked.
        explanation: the report of a failure, as the log shows it.
        images: digest by name.
        build_ids: of the builds in the history.
        facts: `progress.summary.summary_facts`.
        totals: numbers; None when there are none.
        saved_seconds: time of steps that came from a cache; 0 when it is not known.
        steps: in the order of their start.
        warnings: in the order in which they came.
    """

    title: str
    error: str = ""
    explanation: str = ""
    images: Mapping[str, str] = field(default_factory=dict)
    build_ids: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    totals: Totals | None = None
    saved_seconds: float = 0.0
    steps: Sequence[Step] = ()
    warnings: Sequence[VertexWarning] = ()


def summary_markdown(outcome: Outcome) -> str:
    """Return the summary, which ends with an empty line."""
    result = "failed" if outcome.error else "built"
    parts = [f"### {escaped(outcome.title)}: {result}\n", _facts(outcome)]
    if outcome.error:
        parts.append(_failure(outcome))
    parts += [_warnings(outcome.warnings), _steps(outcome.steps)]
    text = ""
    for part in filter(None, parts):
        if len((text + part).encode()) > MAX_BYTES:
            text += "The rest is too long to be shown here.\n\n"
            break
        text += f"{part}\n"
    return text


def escaped(text: str) -> str:
    """Return one line of text that Markdown and HTML show as it is."""
    text = printable(" ".join(text.splitlines()))
    if len(text) > MAX_TEXT_CHARACTERS:
        text = text[: MAX_TEXT_CHARACTERS - 3] + "..."
    if lead := _LEAD.match(text):
        rest = text[lead.end() :]
        return f"{text[: lead.start(1)]}{_entity(lead[1])}{_MARKS.sub(_entity_of, rest)}"
    return _MARKS.sub(_entity_of, text)


def _entity(character: str) -> str:
    return f"&#{ord(character)};"


def _entity_of(mark: re.Match[str]) -> str:
    return _entity(mark[0])


def _facts(outcome: Outcome) -> str:
    rows = [("Image", _image(name, digest)) for name, digest in outcome.images.items()]
    for name, text in outcome.facts.items():
        share = _share(outcome.totals) if name == "Steps" else ""
        rows.append((name, escaped(text + share)))
    if saved := _saved(outcome):
        rows.append(("Saved", escaped(saved)))
    for build_id in map(escaped, outcome.build_ids):
        text = f"<code>{build_id}</code>, its log: <code>offload logs {build_id}</code>"
        rows.append(("Build", text))
    if not rows:
        return ""
    lines = [f"| {name} | {text} |" for name, text in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _image(name: str, digest: str) -> str:
    shown = f"<code>{escaped(digest)}</code>"
    return f"{escaped(name)} {shown}" if name else shown


def _share(totals: Totals | None) -> str:
    if totals is None or not totals.steps:
        return ""
    return f" ({100 * totals.cached // totals.steps}%)"


def _saved(outcome: Outcome) -> str:
    parts = []
    if outcome.saved_seconds >= 1:
        parts.append(f"{format_duration(outcome.saved_seconds)} of steps")
    totals = outcome.totals
    if totals is not None and (kept := totals.context_bytes - totals.context_sent_bytes) > 0:
        parts.append(f"{format_size(kept)} not sent")
    return ", ".join(parts)


def _failure(outcome: Outcome) -> str:
    text = outcome.explanation or f"ERROR: {outcome.error}"
    if len(text) > MAX_OUTPUT_CHARACTERS:
        text = "...\n" + text[-MAX_OUTPUT_CHARACTERS:]
    lines = "\n".join(html.escape(printable(line)) for line in text.splitlines())
    return f"<pre>\n{lines}\n</pre>\n"


def _warnings(warnings: Sequence[VertexWarning]) -> str:
    found = distinct_warnings(warnings)
    if not found:
        return ""
    lines = [f"#### Warnings: {len(found)}\n"]
    for warning in found[:MAX_WARNINGS]:
        place = warning.source_filename
        if place and warning.ranges:
            place += f":{warning.ranges[0].start_line}"
        text = escaped(warning.short.decode("utf-8", "replace"))
        lines.append(f"- <code>{escaped(place)}</code> {text}" if place else f"- {text}")
    if len(found) > MAX_WARNINGS:
        lines.append(f"- and {len(found) - MAX_WARNINGS} more")
    return "\n".join(lines) + "\n"


def _steps(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    lines = [
        f"<details><summary>Steps: {len(steps)}</summary>\n",
        "| Step | Time | |",
        "| --- | ---: | --- |",
    ]
    lines += [
        f"| <code>{escaped(step.title)}</code> | {step.done_seconds():.1f}s | {_state(step)} |"
        for step in steps[:MAX_STEPS]
    ]
    if len(steps) > MAX_STEPS:
        lines.append(f"| and {len(steps) - MAX_STEPS} more | | |")
    return "\n".join([*lines, "\n</details>"]) + "\n"


def _state(step: Step) -> str:
    if step.canceled:
        return "canceled"
    if step.error:
        return "failed"
    return "cached" if step.cached else ""
