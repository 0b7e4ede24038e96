"""The rows of the interactive form, and which of them fit the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.progress.cells import fit, last_lines, printable, text_width

if TYPE_CHECKING:
    from offload_client.progress.model import BuildView
    from offload_client.progress.step import Step
    from offload_client.progress.style import Palette

DEFAULT_LOG_LINES = 6
"""Lines of output below a running step."""
_LOG_PREFIX = " => => # "
# Below this a time beside the name would leave too little of the name.
_LEAST_NAME_CELLS = 12
# Shorter times are noise.
_LEAST_SECONDS = 0.05


@dataclass(slots=True)
class Row:
    """One line of the screen."""

    left: str
    status: str = ""
    """Shown after the text where there is room."""
    time: str = ""
    """Shown at the right edge where there is room."""
    kind: str = ""
    """Name of a colour of the palette; empty for none."""

    def text(self, columns: int) -> str:
        """Return the row in at most `columns` cells; what does not fit is cut at the right."""
        left, right = self.left, self.time
        if right and columns - text_width(right) - 1 >= _LEAST_NAME_CELLS:
            room = columns - text_width(right) - 1
        else:
            room, right = columns, ""
        if self.status and room - len(self.status) - 1 >= _LEAST_NAME_CELLS:
            left = f"{fit(left, room - len(self.status) - 1)} {self.status}"
        left = fit(left, room)
        if not right:
            return left
        return left + " " * (columns - text_width(left) - text_width(right)) + right

    def colour(self, palette: Palette) -> str:
        """Return the row's SGR parameters."""
        return str(getattr(palette, self.kind)) if self.kind else ""


def step_rows(step: Step, view: BuildView, now: float) -> list[Row]:
    """Return the rows of a step: its name, its counters, its warnings."""
    kind, name = "", printable(step.title)
    if step.canceled:
        kind, name = "cancel", f"CANCELED {name}"
    elif step.error:
        kind, name = "error", f"ERROR {name}"
    elif step.completed:
        kind = "run"
    if step.cached:
        name = f"CACHED {name}"
    # Steps of the client are not timed by the node's clock.
    node_now = 0.0 if step.local else view.node_now(now)
    rows = [Row(f" => {name}", time=_time(step.seconds(now, node_now)), kind=kind)]
    rows += [
        Row(
            f" => => {printable(counter.id)}",
            status=counter.amount(),
            time=_time(counter.seconds(now)),
            kind="run" if counter.completed_ns is not None else "",
        )
        for counter in step.counters.values()
    ]
    for warning in step.warnings:
        short = warning.short.decode("utf-8", "replace")
        rows.append(Row(f" => => WARN: {printable(short)}", kind="warning"))
    return rows


def choose_rows(view: BuildView, now: float, limit: int, log_lines: int) -> list[Row]:
    """Return the most useful rows, at most `limit`, in the order of the steps.

    Running steps come first, then their last output, then as many of the steps that ended last
    as there is room for.

    Args:
        view: the build.
        now: local monotonic seconds.
        limit: rows that there are.
        log_lines: most lines of output below one step.
    """
    if limit <= 0:
        return []
    running = [step for step in view.shown if step.running]
    blocks: dict[str, list[Row]] = {}
    room = limit
    # The step that started last is the most interesting when not even the running ones fit.
    for step in running[-limit:]:
        blocks[step.digest] = step_rows(step, view, now)[:1]
        room -= 1
    for step in running:
        if step.digest in blocks and room > 0:
            more = step_rows(step, view, now)[1:][:room]
            blocks[step.digest] += more
            room -= len(more)
    for step in running:
        if step.digest in blocks and step.log and room > 0:
            chunks = (data for _, data in reversed(step.log))
            output = last_lines(chunks, min(log_lines, room))
            blocks[step.digest] += [Row(_LOG_PREFIX + line, kind="faint") for line in output]
            room -= len(output)
    for step in reversed(view.shown):
        if room <= 0:
            break
        if not step.running and step.intervals:
            blocks[step.digest] = step_rows(step, view, now)[:room]
            room -= len(blocks[step.digest])
    return [row for step in view.shown for row in blocks.get(step.digest, ())]


def _time(seconds: float) -> str:
    return f"{seconds if seconds >= _LEAST_SECONDS else 0.0:.1f}s"
