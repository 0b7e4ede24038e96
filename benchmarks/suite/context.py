"""`context`: what a build context costs on its way to the builder, in bytes, time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.context.first import CASES as FIRST
from benchmarks.context.first import first
from benchmarks.context.known import CASES as KNOWN
from benchmarks.context.known import known
from benchmarks.context.large import CASES as LARGE
from benchmarks.context.large import large
from benchmarks.context.memory import CASES as MEMORY
from benchmarks.context.memory import memory
from benchmarks.context.scan import CASES as SCAN
from benchmarks.context.scan import scan
from benchmarks.model import Benchmark

if TYPE_CHECKING:
    from benchmarks.session import Session

GROUPS = ((KNOWN, known), (LARGE, large), (FIRST, first), (SCAN, scan), (MEMORY, memory))


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group on daemons of its own."""
    for cases, measure in GROUPS:
        if session.wants(*(case.name for case in cases)):
            measure(session)


BENCHMARK = Benchmark(
    "context",
    "the build context: bytes, wall time over a WAN and over loopback, memory",
    tuple(case for cases, _ in GROUPS for case in cases),
    run,
)
