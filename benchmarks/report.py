"""The table for people and the list for programs."""

from __future__ import annotations

import os
import platform
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.model import Row

HEADINGS = ("case", "ours", "peer", "unit", "ratio", "per round", "runs", "goal", "")


def row_line(row: Row) -> str:
    """Return a row as one line, for the progress."""
    ours, peer = statistics.median(row.ours), statistics.median(row.peer)
    goal = "" if row.case.goal is None else f", goal {row.case.goal:g}"
    return f"{row.case.name}: {ours:.3f} against {peer:.3f} {row.case.unit}, {row.ratio:.2f}{goal}"


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; a figure is its median (smallest - largest)."""
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain data; `ours` and `peer` are medians."""
    return [
        {
            "benchmark": row.benchmark,
            "case": row.case.name,
            "ours": round(statistics.median(row.ours), 4),
            "peer": round(statistics.median(row.peer), 4),
            "unit": row.case.unit,
            "ratio": round(row.ratio, 4),
            "runs": len(row.ours),
            "goal": row.case.goal,
        }
        for row in rows
    ]


def machine() -> str:
    """Return what a reader has to know of this machine; no names of hosts or people."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load before {load}"
    )


def _cells(row: Row) -> tuple[str, ...]:
    paired = row.paired
    goal = row.case.goal
    return (
        row.case.name,
        _figure(row.ours),
        _figure(row.peer),
        row.case.unit,
        f"{row.ratio:.2f}",
        f"{min(paired):.2f} - {max(paired):.2f}",
        str(len(row.ours)),
        "" if goal is None else f"<= {goal:g}",
        {None: "", True: "met", False: "missed"}[row.met],
    )


def _figure(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"
