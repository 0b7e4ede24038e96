"""Cases `steps-isolated*`: what a network of its own costs a step that does next to nothing."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from benchmarks.egress import rules
from benchmarks.egress.steps import bare, build_output, isolated
from benchmarks.model import Case
from tests.fixtures.buildkit import BASE

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session
    from offload_builder.buildkit import BuildkitDaemon

RUNS = 8
IN_A_ROW, AT_ONCE = 20, 8
_BARE = "the same on the machine's own network"
_PER_STEP = "the difference in each round, per step"
ROW = Case("steps-isolated", f"a build of {IN_A_ROW} RUN steps, one after the other", _BARE)
ROW_ADDED = Case("steps-isolated-added", _PER_STEP, "", unit="ms")
MANY = Case("steps-isolated-parallel", f"a build of {AT_ONCE} RUN steps at once", _BARE)
MANY_ADDED = Case("steps-isolated-parallel-added", _PER_STEP, "", unit="ms")
CASES = (ROW, ROW_ADDED, MANY, MANY_ADDED)


def tiny_steps(session: Session, ground: Ground) -> None:
    """Measure the cases."""
    network = ground.enter(ground.firewall().attach("many", rules.effective(rules.many())))
    ours = ground.enter(isolated(ground.work / "many", network))
    theirs = ground.enter(bare(ground.work / "bare"))
    for case, added, dockerfile, count in (
        (ROW, ROW_ADDED, _in_a_row, IN_A_ROW),
        (MANY, MANY_ADDED, _at_once, AT_ONCE),
    ):
        if not session.wants(case.name, added.name):
            continue
        found = session.interleave(
            case.name,
            {
                "isolated": _built(ground, ours, dockerfile),
                "bare": _built(ground, theirs, dockerfile),
            },
            runs=RUNS,
        )
        session.report(case.name, found["isolated"], found["bare"])
        pairs = zip(found["isolated"], found["bare"], strict=True)
        session.report(added.name, [1000 * (mine - other) / count for mine, other in pairs])


def _built(
    ground: Ground, daemon: BuildkitDaemon, dockerfile: Callable[[], str]
) -> Callable[[int], float]:
    async def build() -> float:
        began = time.perf_counter()
        await build_output(daemon, dockerfile())
        return time.perf_counter() - began

    return lambda _: ground.run(build())


def _in_a_row() -> str:
    salt = secrets.token_hex(8)
    return BASE + "".join(f"RUN : {salt} {number}\n" for number in range(IN_A_ROW))


def _at_once() -> str:
    salt = secrets.token_hex(8)
    base = BASE.replace("FROM scratch", "FROM scratch AS base", 1)
    stages = "".join(
        f"FROM base AS s{number}\nRUN : {salt}; busybox touch /f{number}\n"
        for number in range(AT_ONCE)
    )
    copies = "".join(f"COPY --from=s{number} /f{number} /\n" for number in range(AT_ONCE))
    return f"{base}{stages}FROM scratch\n{copies}"
