"""One module per benchmark; a module here with a `BENCHMARK` is a benchmark, nothing is listed."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.model import Benchmark


def find_benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        benchmark = importlib.import_module(f"{__name__}.{module.name}").BENCHMARK
        if not isinstance(benchmark, Benchmark):
            raise TypeError(f"BENCHMARK of {module.name} is not a Benchmark")
        found[benchmark.name] = benchmark
    return found
