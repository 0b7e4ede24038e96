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
    text = f"{row.case.name}: {statistics.median(row.ours):.3f} {row.case.unit}"
    if row.ratio is not None:
        text += f" against {statistics.median(row.peer):.3f} {row.case.unit}, {_ratio(row.ratio)}"
    return f"{text}, goal {row.case.goals}" if row.case.goals else text


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; a figure is its median (smallest - largest)."""
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain data; `ours` and `peer` are medians, null without a peer."""
    return [
        {
            "benchmark": row.benchmark,
            "case": row.case.name,
            "ours": round(statistics.median(row.ours), 4),
            "peer": round(statistics.median(row.peer), 4) if row.peer else None,
            "unit": row.case.unit,
            "ratio": None if row.ratio is None else round(row.ratio, 4),
            "runs": len(row.ours),
            "goal": row.case.goal,
            "limit": row.case.limit,
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
    return (
        row.case.name,
        _figure(row.ours),
        _figure(row.peer),
        row.case.unit,
        "" if row.ratio is None else _ratio(row.ratio),
        f"{_ratio(min(paired))} - {_ratio(max(paired))}" if paired else "",
        str(len(row.ours)),
        row.case.goals,
        {None: "", True: "met", False: "missed"}[row.met],
    )


def _ratio(value: float) -> str:
    if value >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _figure(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"
