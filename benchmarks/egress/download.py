"""Cases `download-*`: one TCP stream, through ten thousand rules and past them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.egress import rules
from benchmarks.egress.steps import isolated, step_output, stock, taken_of
from benchmarks.model import BenchmarkError, Case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session
    from offload_builder.buildkit import BuildkitDaemon

RUNS = 40
SIZE_BYTES = 1 << 30
GOAL = 1.03
"""Of the time; a throughput of 0.97 is the same."""
PROCESS = Case(
    "download-10k-rules",
    "1.1 GB to the project's namespace",
    "the same way, a policy without rules",
    goal=GOAL,
)
FORWARDED = Case(
    "download-10k-rules-forwarded",
    "the same",
    "as many namespaces on the way, nothing of nftables in any of them",
)
STEP = Case(
    "download-10k-rules-step",
    "1.1 GB to a RUN step",
    "a RUN step, the same way, a policy without rules",
    goal=GOAL,
)
STOCK = Case(
    "download-10k-rules-bridge",
    "the same",
    "a RUN step of stock BuildKit: bridge, masquerading",
)
CASES = (PROCESS, FORWARDED, STEP, STOCK)
_PLACE = f"take:{rules.SERVER}:{rules.STREAMS}/{SIZE_BYTES}"


def download(session: Session, ground: Ground) -> None:
    """Measure the cases."""
    firewall = ground.firewall()
    many = ground.enter(firewall.attach("many", rules.effective(rules.many())))
    none = ground.enter(firewall.attach("none", rules.effective(rules.none())))
    if session.wants(PROCESS.name, FORWARDED.name):
        forwarded = ground.run(ground.forwarded())

        def process(namespace: Path) -> Callable[[int], float]:
            return lambda _: _seconds(ground.probe_in(namespace, _PLACE))

        found = session.interleave(
            PROCESS.name,
            {
                "rules": process(many.namespace),
                "none": process(none.namespace),
                "forwarded": process(forwarded.path),
            },
            runs=RUNS,
        )
        session.report(PROCESS.name, found["rules"], found["none"])
        session.report(FORWARDED.name, found["rules"], found["forwarded"])
    if session.wants(STEP.name, STOCK.name):
        machine = ground.run(ground.machine(2))

        def step(daemon: BuildkitDaemon) -> Callable[[int], float]:
            return lambda _: _seconds(ground.run(step_output(daemon, f"probe {_PLACE}")))

        contestants = {
            "rules": step(ground.enter(isolated(ground.work / "many", many))),
            "none": step(ground.enter(isolated(ground.work / "none", none))),
            "stock": step(ground.enter(stock(ground.work / "stock", machine))),
        }
        found = session.interleave(STEP.name, contestants, runs=RUNS)
        session.report(STEP.name, found["rules"], found["none"])
        session.report(STOCK.name, found["rules"], found["stock"])


def _seconds(output: str) -> float:
    taken = taken_of(output, _PLACE)
    if taken.size_bytes != SIZE_BYTES:
        raise BenchmarkError(f"{taken.size_bytes} of {SIZE_BYTES} bytes came")
    return taken.seconds
