"""`session`: docker commands whose engine is at a node, against the same engine without us."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.model import Benchmark
from benchmarks.offloaded.commands import CASES as COMMANDS
from benchmarks.offloaded.commands import commands
from benchmarks.offloaded.ground import require_parts
from benchmarks.offloaded.memory import CASES as MEMORY
from benchmarks.offloaded.memory import memory
from benchmarks.offloaded.ports import CASES as PORTS
from benchmarks.offloaded.ports import ports
from benchmarks.offloaded.starts import CASES as STARTS
from benchmarks.offloaded.starts import starts
from benchmarks.offloaded.trees import CASES as TREES
from benchmarks.offloaded.trees import trees

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.model import Case
    from benchmarks.session import Session

GROUPS: Sequence[tuple[Sequence[Case], Callable[[Session, Path], None]]] = (
    (STARTS, starts),
    (COMMANDS, commands),
    (PORTS, ports),
    (TREES, trees),
    (MEMORY, memory),
)


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group on a pool of its own."""
    require_parts()
    for cases, measure in GROUPS:
        if session.wants(*(case.name for case in cases)):
            measure(session, session.work / cases[0].name)


BENCHMARK = Benchmark(
    "session",
    "docker commands in a session against the same engine's own socket, and ssh",
    tuple(case for cases, _ in GROUPS for case in cases),
    run,
)
