"""Cases `warm-noop-isolated*`: a build without a change, behind the firewall and beside it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.model import Case
from benchmarks.onenode import BUILDER, BUILDX, start_parts
from benchmarks.projects import small_project

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.egress.ground import Ground
    from benchmarks.onenode import Parts
    from benchmarks.session import Session

RUNS = 16
_OURS = "offload-build, every step cached, isolated node"
PLAIN = Case("warm-noop-isolated", _OURS, "the same, a node with isolation none")
STOCK = Case("warm-noop-isolated-buildx", _OURS, f"{BUILDX}, the BuildKit of the isolated node")
CASES = (PLAIN, STOCK)


def warm(session: Session, ground: Ground) -> None:
    """Measure the cases. The nodes take the ground's machine for theirs."""
    with ExitStack() as stack:
        isolated = start_parts(session, stack, isolation="netns")
        plain = start_parts(session, stack, isolation="none")

        def ours(parts: Parts, name: str) -> Callable[[int], float]:
            context = small_project(ground.work / f"warm-{name}")
            parts.member.build(context)
            parts.member.wait_published()

            def build(_: int) -> float:
                parts.member.wait_helper()
                return parts.rested(parts.member.build(context).require_cached())

            return build

        def buildx(_: int) -> float:
            context = ground.work / "warm-isolated"
            return isolated.rested(isolated.buildx.build(BUILDER, context).require_cached())

        found = session.interleave(
            PLAIN.name,
            {
                "isolated": ours(isolated, "isolated"),
                "none": ours(plain, "none"),
                "buildx": buildx,
            },
            runs=RUNS,
            warmups=2,
        )
    session.report(PLAIN.name, found["isolated"], found["none"])
    session.report(STOCK.name, found["isolated"], found["buildx"])
