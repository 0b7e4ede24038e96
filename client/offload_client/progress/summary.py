"""What a build came to: cached steps, bytes that did not travel, and where the time went."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from offload_client.progress.clock import NANOSECONDS
from offload_client.progress.step import Step
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_client.progress.model import BuildView
    from offload_proto.v1.builds_service_pb2 import BuildStats

_LEAD = "[offload] "
# Of a shorter build nobody asks where the time went.
_LEAST_TOTAL_SECONDS = 1.0
_LEAST_PART_SECONDS = 0.1
_LONG_NAME_CHARACTERS = 50

# How steps of BuildKit and of ours are called, by what their time is called. All else that is
# numbered is a step of the Dockerfile.
_PARTS = (
    ("waiting for a node", ("[offload] waiting",)),
    ("context", ("[internal] load build context", "[offload] build context", "[offload] sending")),
    ("loading", ("[offload] loading", "[offload] writing")),
    ("export", ("exporting ", "sending tarball", "copying files", "pushing ")),
    ("cache import", ("importing cache",)),
    ("base images", ("[internal] load metadata",)),
    ("Dockerfile", ("[internal] ",)),
)
# Of a bake, with the name of the target in front: "[app] exporting", "[app internal] load".
_OF_TARGET = re.compile(r"^\[(?!internal\]|offload\])[^\] /]+\] (?=[a-z])")
_OF_TARGET_GROUP = re.compile(r"\[[^\] ]+ (internal|offload)\] ")


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of a build that has ended.

    Attributes:
        steps: of the Dockerfile.
        cached: of these, from a cache.
        context_bytes: size of the build context.
        context_sent_bytes: of these, how many were sent, before compression.
        context_wire_bytes: as they travelled.
        loaded_layers: layers that were fetched into the engine.
        reused_layers: layers that the engine had.
        loaded_bytes: what was fetched into the engine.
        loaded: the image was to be loaded.
    """

    steps: int = 0
    cached: int = 0
    context_bytes: int = 0
    context_sent_bytes: int = 0
    context_wire_bytes: int = 0
    loaded: bool = False
    loaded_layers: int = 0
    reused_layers: int = 0
    loaded_bytes: int = 0

    @classmethod
    def of(cls, stats: BuildStats) -> Totals:
        """Return what the node has counted."""
        return cls(
            steps=stats.steps_total,
            cached=stats.steps_cached,
            context_bytes=stats.context_bytes,
            context_sent_bytes=stats.context_sent_bytes,
            context_wire_bytes=stats.context_wire_bytes,
        )

    def __add__(self, other: Totals) -> Totals:
        """Return the numbers of both builds together."""
        return Totals(
            *(
                mine or theirs if isinstance(mine, bool) else mine + theirs
                for mine, theirs in zip(astuple(self), astuple(other), strict=True)
            )
        )


def summary_lines(view: BuildView, totals: Totals, now: float) -> list[str]:
    """Return at most two lines, the second only when the build took a while.

    Args:
        view: the build, at its end.
        totals: its numbers.
        now: local monotonic seconds.
    """
    lines = []
    if saved := "; ".join(filter(None, (_steps(totals), _context(totals), _image(totals)))):
        lines.append(_LEAD + saved)
    elapsed = view.elapsed_seconds(now)
    if elapsed >= _LEAST_TOTAL_SECONDS and (parts := _times(view.shown)):
        lines.append(f"{_LEAD}{elapsed:.1f}s: {', '.join(parts)}")
    return lines


def summary_facts(view: BuildView, totals: Totals, now: float) -> dict[str, str]:
    """Return the same by heading, for a table; nothing where there is nothing to say."""
    elapsed = view.elapsed_seconds(now)
    facts = {
        "Steps": _steps(totals),
        "Context": _context(totals).removeprefix("context "),
        "Load": _image(totals),
        "Time": ": ".join(filter(None, (f"{elapsed:.1f}s", ", ".join(_times(view.shown))))),
    }
    return {name: text for name, text in facts.items() if text}


def _steps(totals: Totals) -> str:
    if not totals.steps:
        return ""
    return f"{totals.cached} of {_count(totals.steps, 'step')} cached"


def _context(totals: Totals) -> str:
    if not totals.context_bytes:
        return ""
    sent = min(totals.context_sent_bytes, totals.context_bytes)
    if not sent:
        return f"context {format_size(totals.context_bytes)}, nothing sent"
    text = f"context {format_size(totals.context_bytes)}, {format_size(sent)} sent"
    if 0 < totals.context_wire_bytes < sent:
        text += f" in {format_size(totals.context_wire_bytes)}"
    return text


def _image(totals: Totals) -> str:
    if not totals.loaded:
        return ""
    if not totals.loaded_layers:
        return "image unchanged" if totals.reused_layers else ""
    layers = _count(totals.loaded_layers + totals.reused_layers, "layer")
    return f"{totals.loaded_layers} of {layers} loaded ({format_size(totals.loaded_bytes)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _times(steps: Iterable[Step]) -> list[str]:
    """Return where the time went, the longest first.

    Steps may run side by side, so that the parts need not add up to the whole; within a part,
    time is counted once.
    """
    parts: dict[str, list[Step]] = {}
    for step in steps:
        if step.completed and (part := _part(step.title)):
            parts.setdefault(part, []).append(step)
    timed = sorted(((_seconds(group), part) for part, group in parts.items()), reverse=True)
    return [
        f"{part} {seconds:.1f}s{_longest(parts[part]) if part == 'steps' else ''}"
        for seconds, part in timed
        if seconds >= _LEAST_PART_SECONDS
    ]


def _part(title: str) -> str:
    title = _OF_TARGET.sub("", title)
    if begun := _OF_TARGET_GROUP.match(title):
        title = f"[{begun[1]}] {title[begun.end() :]}"
    for part, beginnings in _PARTS:
        if title.startswith(beginnings):
            return part
    bracket = title.partition("] ")
    if title.startswith("[") and "/" in bracket[0]:
        return "base images" if bracket[2].startswith("FROM ") else "steps"
    return ""


def _longest(steps: list[Step]) -> str:
    """Return the step that took most of the time, where there is a choice."""
    if len(steps) < 2:
        return ""
    step = max(steps, key=Step.done_seconds)
    name = step.title
    if len(name) > _LONG_NAME_CHARACTERS:
        name = name[: _LONG_NAME_CHARACTERS - 3] + "..."
    return f" (longest: {name}, {step.done_seconds():.1f}s)"


def _seconds(steps: Iterable[Step]) -> float:
    spans = sorted(
        (start, end) for step in steps for start, end in step.intervals.items() if end is not None
    )
    total, reached = 0, 0
    for start, end in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total / NANOSECONDS
