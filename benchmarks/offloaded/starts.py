"""Cases `start-*` and `resume`: until docker commands can be given."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError, Case
from benchmarks.offloaded.ground import Ground

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

WARM = Case("start-warm", "offload start, the engine is made", "", limit=2.0)
READY = Case("start-ready", "offload start, an engine is ready", "", limit=0.5)
STOP = Case("stop", "offload stop, everything is removed", "")
RESUME = Case("resume", "docker ps in a session that is paused", "", limit=5.0)
CASES = (WARM, READY, STOP, RESUME)
RUNS = 8
RESUMES = 4
IDLE = "5s"
PAUSE_SECONDS = 60.0


def starts(session: Session, folder: Path) -> None:
    """Measure the cases."""
    for case, ready in ((WARM, 0), (READY, 1)):
        if session.wants(case.name, STOP.name):
            with Ground(folder / case.name, ready=ready) as ground:
                found, stops = _measure(session, ground, case, ready)
            session.report(case.name, found)
            if case is READY:
                session.report(STOP.name, stops)
    if session.wants(RESUME.name):
        with Ground(folder / RESUME.name, ready=0, session_grace="10m") as ground:
            ground.start("--idle-timeout", IDLE)
            found = session.interleave(
                RESUME.name, {"ours": lambda _: _resumed(ground)}, runs=RESUMES, warmups=0
            )["ours"]
        session.report(RESUME.name, found)


def _measure(
    session: Session, ground: Ground, case: Case, ready: int
) -> tuple[list[float], list[float]]:
    stops: list[float] = []

    def started(_: int) -> float:
        ground.wait_ready(ready)
        seconds = ground.start()
        # That it is of use is part of the proof, and not of the figure.
        if not ground.docker(ground.session, "version", "-f", "{{.Server.Version}}")[0]:
            raise BenchmarkError("the engine does not answer")
        began = time.perf_counter()
        ground.stop()
        stops.append(time.perf_counter() - began)
        return seconds

    found = session.interleave(case.name, {"ours": started}, runs=RUNS)["ours"]
    return found, stops[-len(found) :]


def _resumed(ground: Ground) -> float:
    deadline = time.monotonic() + PAUSE_SECONDS
    while True:
        listed, _ = ground.offload("ps", "--format", "json")
        states = {json.loads(line)["state"] for line in listed.splitlines()}
        if states == {"paused"}:
            break
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the session does not pause but is {sorted(states)}")
        time.sleep(0.2)
    return ground.docker(ground.session, "ps", "-q")[1]
