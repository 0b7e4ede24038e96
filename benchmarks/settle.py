"""Waiting until daemons have nothing left to do, so that one run does not pay for another."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

WINDOW_SECONDS = 0.25
BUSY_SHARE = 0.12
"""Idle daemons with their timers stay well below this share of one core."""
LIMIT_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


def wait_quiet(roots: Iterable[int]) -> None:
    """Return when these processes and their descendants have used next to no CPU for a moment.

    Raises:
        BenchmarkError: they never rest.
    """
    roots = list(roots)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        before = _cpu_seconds(roots)
        time.sleep(WINDOW_SECONDS)
        if _cpu_seconds(roots) - before < WINDOW_SECONDS * BUSY_SHARE:
            return
    raise BenchmarkError(f"the daemons still work after {LIMIT_SECONDS:.0f} s")


def _cpu_seconds(roots: Iterable[int]) -> float:
    return sum(_one(pid) for root in roots for pid in descendants(root))


def descendants(root: int, *, without: Collection[str] = ()) -> list[int]:
    """Return a process and all that descend from it.

    Args:
        root: the process.
        without: names of programs to leave out, with all that descend from them.
    """
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        if without and _name(pid) in without:
            continue
        found.append(pid)
        queue += children(pid)
    return found


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not ended."""
    found: list[int] = []
    # They are listed under the thread that started them.
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, listing.read_text().split())
        except OSError:
            continue
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _one(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # After the name in brackets: fields 14 and 15 of proc(5) are user and system time.
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
