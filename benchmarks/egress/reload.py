"""Cases `reload-*`: ten thousand rules are replaced five times while a step downloads."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

from benchmarks.egress import rules
from benchmarks.egress.steps import Taken, isolated, step_output, taken_of
from benchmarks.egress.streams import BLOCK_BYTES, digest_of
from benchmarks.model import BenchmarkError, Case
from offload_builder.egress.firewall.namespaces import NetworkNamespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.egress.ground import Ground
    from benchmarks.session import Session
    from offload_builder.buildkit import BuildkitDaemon
    from offload_builder.egress.firewall.lifecycle import EgressFirewall
    from offload_builder.egress.policy.model import EffectivePolicy

RUNS = 4
RELOADS = 5
STREAM_SECONDS = 8
SIZE_BYTES = 500 * BLOCK_BYTES
DURING = Case(
    "reload-during-download",
    "longest wait between two pieces of a download in a RUN step, 5 reloads",
    "the same without a reload",
    unit="ms",
)
APPLY = Case("reload-apply", "replacing 10,000 rules by 10,000 others, while it downloads", "")
CASES = (DURING, APPLY)
_PLACE = f"take:{rules.SERVER}:{rules.STREAMS}/{SIZE_BYTES}/{STREAM_SECONDS}"


def reload(session: Session, ground: Ground) -> None:
    """Measure the cases.

    Raises:
        BenchmarkError: a download broke, was changed, or a new connection met the old rules.
    """
    firewall = ground.firewall()
    began = time.perf_counter()
    wide = rules.effective(rules.many())
    session.note(f"reading the policy took {time.perf_counter() - began:.2f} s")
    narrow = rules.effective(rules.many(ports=(rules.STREAMS,)))
    network = ground.enter(firewall.attach("many", wide))
    visitor = NetworkNamespace("visitor", network.namespace)
    daemon = ground.enter(isolated(ground.work / "many", network))
    applied: list[float] = []

    async def change() -> None:
        for number in range(RELOADS):
            await asyncio.sleep(STREAM_SECONDS / (RELOADS + 1))
            policy = wide if number % 2 else narrow
            moment = time.perf_counter()
            await firewall.apply("many", policy)
            applied.append(time.perf_counter() - moment)
            if await visitor.run(_visit) != (policy is wide):
                raise BenchmarkError("a new connection met the rules from before the reload")

    def gap(changing: bool) -> Callable[[int], float]:
        def measured(_: int) -> float:
            ground.run(_reset(firewall, wide))
            taken = ground.run(_download(daemon, change if changing else None))
            return 1000 * taken.gap_seconds

        return measured

    try:
        found = session.interleave(
            DURING.name, {"reloads": gap(True), "none": gap(False)}, runs=RUNS, warmups=0
        )
    finally:
        visitor.close()
    session.report(DURING.name, found["reloads"], found["none"])
    session.report(APPLY.name, applied)


async def _reset(firewall: EgressFirewall, policy: EffectivePolicy) -> None:
    await firewall.apply("many", policy)


async def _download(daemon: BuildkitDaemon, change: Callable[[], object] | None) -> Taken:
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(step_output(daemon, f"probe {_PLACE}"))
        if change is not None:
            tasks.create_task(change())
    taken = taken_of(output.result(), _PLACE)
    if taken.size_bytes != SIZE_BYTES or taken.digest != digest_of(SIZE_BYTES):
        raise BenchmarkError(f"what came is not what was sent: {taken}")
    return taken


def _visit() -> bool:
    """Return whether a new connection opens. For a thread in the project's namespace."""
    try:
        socket.create_connection((rules.SERVER, rules.VISITS), timeout=3).close()
    except ConnectionRefusedError:
        return False
    return True
