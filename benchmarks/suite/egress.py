"""`egress`: what the firewall of a node costs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import structlog

from benchmarks.egress.connect import CASES as CONNECT
from benchmarks.egress.connect import connect
from benchmarks.egress.download import CASES as DOWNLOAD
from benchmarks.egress.download import download
from benchmarks.egress.ground import Ground, require_parts
from benchmarks.egress.names import CASES as NAMES
from benchmarks.egress.names import lookups
from benchmarks.egress.reload import CASES as RELOAD
from benchmarks.egress.reload import reload
from benchmarks.egress.start import CASES as START
from benchmarks.egress.start import start
from benchmarks.egress.tinysteps import CASES as STEPS
from benchmarks.egress.tinysteps import tiny_steps
from benchmarks.egress.warm import CASES as WARM
from benchmarks.egress.warm import warm
from benchmarks.model import Benchmark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.model import Case
    from benchmarks.session import Session

GROUPS: Sequence[tuple[Sequence[Case], Callable[[Session, Ground], None]]] = (
    (DOWNLOAD, download),
    (CONNECT, connect),
    (START, start),
    (STEPS, tiny_steps),
    (RELOAD, reload),
    (WARM, warm),
    (NAMES, lookups),
)


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group in a world of its own."""
    require_parts()
    # Parts of a node run in this process, and would tell of each project that comes and goes.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    for cases, measure in GROUPS:
        if session.wants(*(case.name for case in cases)):
            folder = session.work / cases[0].name
            folder.mkdir()
            with Ground(folder) as ground:
                measure(session, ground)


BENCHMARK = Benchmark(
    "egress",
    "what the firewall of a node costs",
    tuple(case for cases, _ in GROUPS for case in cases),
    run,
)
