"""Cases `idle-memory*`: what a session that does nothing costs the node and the laptop."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model import Case
from benchmarks.offloaded.ground import NODE, Ground
from benchmarks.rss import resident_bytes
from benchmarks.settle import wait_quiet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.session import Session

MEGABYTE = 1_000_000
LIMIT = 60
ENGINE = Case(
    "idle-memory", "private memory of the session's engine, idle", "", unit="MB", limit=LIMIT
)
LAPTOP = Case(
    "idle-memory-laptop", "memory of the session's helper, idle", "", unit="MB", limit=LIMIT
)
CASES = (ENGINE, LAPTOP)
RUNS = 3
REST_SECONDS = 5.0
_PRIVATE = re.compile(r"^Private_(?:Clean|Dirty): +(\d+) kB$", re.MULTILINE)


def memory(session: Session, folder: Path) -> None:
    """Measure the cases, each time with a new session that has run one container."""
    engines: list[float] = []
    helpers: list[float] = []

    def idle(_: int) -> float:
        ground.start()
        ground.load()
        ground.docker(ground.session, "run", "--rm", "box:1", "true")
        time.sleep(REST_SECONDS)
        wait_quiet([ground.pool.node_pid(NODE), ground.helper_pid()])
        # That of the session, which has run a container.
        engines.append(max(map(_private, ground.engines())) / MEGABYTE)
        helpers.append(resident_bytes([ground.helper_pid()]) / MEGABYTE)
        ground.stop()
        return engines[-1]

    # With one engine ready, as nodes have by default: programs are in memory once for all engines.
    with Ground(folder, ready=1) as ground:
        session.interleave(ENGINE.name, {"ours": idle}, runs=RUNS, warmups=0)
    session.report(ENGINE.name, engines)
    session.report(LAPTOP.name, helpers)


def _private(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * sum(map(int, _PRIVATE.findall(text)))
    return total
