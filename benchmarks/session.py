"""One run of one benchmark: what was asked for, where it works, and what it has found."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from benchmarks.model import Row
from benchmarks.pairing import interleave
from benchmarks.report import row_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.model import Benchmark


class Session:
    """Given to `Benchmark.run`.

    Attributes:
        work: a temporary directory, removed afterwards.
        rows: what was reported so far.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        work: Path,
        *,
        cases: Sequence[str] = (),
        runs: int | None = None,
    ) -> None:
        self.benchmark = benchmark
        self.work = work
        self.rows: list[Row] = []
        self._cases = [case.name for name in cases for case in benchmark.select(name)]
        self._runs = runs
        self._began = time.monotonic()

    def wants(self, *cases: str) -> bool:
        """Return whether one of these cases is to be measured."""
        return not self._cases or not set(cases).isdisjoint(self._cases)

    def note(self, text: str) -> None:
        """Tell the person who waits what happens."""
        print(f"[{time.monotonic() - self._began:6.1f}s] {text}", file=sys.stderr, flush=True)

    def interleave(
        self,
        what: str,
        contestants: Mapping[str, Callable[[int], float]],
        *,
        runs: int,
        warmups: int = 1,
    ) -> dict[str, list[float]]:
        """Measure the contestants in turn; see `pairing.interleave`.

        Args:
            what: for the progress lines.
            contestants: by name, a function that makes one run and returns its figure.
            runs: counted rounds, unless the command line says otherwise.
            warmups: rounds before that are not counted.
        """

        def show(number: int, name: str, figure: float) -> None:
            label = "warm-up" if number < warmups else f"run {number - warmups + 1}"
            self.note(f"{what} {label}: {name} {figure:.3f}")

        return interleave(contestants, runs=self._runs or runs, warmups=warmups, show=show)

    def report(self, case: str, ours: Sequence[float], peer: Sequence[float] = ()) -> None:
        """Keep the figures of a case, unless it was not asked for; `peer` only if it has one."""
        if self.wants(case):
            row = Row(self.benchmark.name, self.benchmark.case(case), list(ours), list(peer))
            self.rows.append(row)
            self.note(row_line(row))
