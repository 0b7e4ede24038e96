"""`cache`: the layers that a team shares, against BuildKit's own cache in the same S3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cache.hop import CASES as HOP
from benchmarks.cache.hop import hop
from benchmarks.cache.offer import CASES as OFFER
from benchmarks.cache.offer import offer
from benchmarks.cache.onenode import CASES as ONE_NODE
from benchmarks.cache.onenode import one_node
from benchmarks.cache.registry import CASES as REGISTRY
from benchmarks.cache.registry import registries
from benchmarks.model import Benchmark

if TYPE_CHECKING:
    from benchmarks.session import Session

GROUPS = ((ONE_NODE, one_node), (HOP, hop), (OFFER, offer), (REGISTRY, registries))


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group on daemons of its own."""
    for cases, measure in GROUPS:
        if session.wants(*(case.name for case in cases)):
            measure(session)


BENCHMARK = Benchmark(
    "cache",
    "the shared layer cache: warm, cold, a second node, bytes; and the registry below it",
    tuple(case for cases, _ in GROUPS for case in cases),
    run,
)
