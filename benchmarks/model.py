"""What a benchmark is, and what comes out of it."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.session import Session

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class BenchmarkError(Exception):
    """A run did not do what is measured, or a part of the benchmark did not work."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark's table.

    Attributes:
        name: short, in kebab-case.
        ours: what we run, for people.
        peer: what it is compared with.
        goal: the ratio ours/peer should not be above this; None without a goal.
        unit: of the figures; less is better.
    """

    name: str
    ours: str
    peer: str
    goal: float | None = None
    unit: str = "s"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not in kebab-case")


@dataclass(frozen=True)
class Benchmark:
    """Several cases that share daemons. `run` reports each case that the session wants."""

    name: str
    summary: str
    cases: Sequence[Case]
    run: Callable[[Session], None]

    def case(self, name: str) -> Case:
        """Return a case by its name.

        Raises:
            BenchmarkError: there is none.
        """
        for case in self.cases:
            if case.name == name:
                return case
        raise BenchmarkError(f"benchmark {self.name} has no case {name!r}")


@dataclass(frozen=True)
class Row:
    """The figures of a case; `ours[i]` and `peer[i]` were taken in the same round."""

    benchmark: str
    case: Case
    ours: Sequence[float]
    peer: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median of ours over median of the peer's; below 1 we are better."""
        return statistics.median(self.ours) / statistics.median(self.peer)

    @property
    def paired(self) -> list[float]:
        """The ratio of each round; its spread says how far the median can be trusted."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        return None if self.case.goal is None else self.ratio <= self.case.goal
