"""`mounts`: cache mounts on nodes that never had them."""

from __future__ import annotations

from benchmarks.cache.mounts import CASES, mounts
from benchmarks.model import Benchmark

BENCHMARK = Benchmark(
    "mounts",
    "cache mounts that move: a cold node with and without, and what the feature costs",
    CASES,
    mounts,
)
