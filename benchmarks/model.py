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
        peer: what it is compared with; empty for a figure of ours alone.
        goal: the ratio ours/peer should not be above this; None without such a goal.
        unit: of the figures; less is better.
        limit: no figure of ours should be above this, in `unit`; None without such a goal.
    """

    name: str
    ours: str
    peer: str
    goal: float | None = None
    unit: str = "s"
    limit: float | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not in kebab-case")
        if self.goal is not None and not self.peer:
            raise ValueError(f"{self.name} has a ratio as its goal, but nothing to compare with")

    @property
    def goals(self) -> str:
        """The goals in words, ratio first; empty without any."""
        ratio = [] if self.goal is None else [f"<= {self.goal:g}"]
        absolute = [] if self.limit is None else [f"<= {self.limit:g} {self.unit}"]
        return " and ".join(ratio + absolute)


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

    def select(self, name: str) -> list[Case]:
        """Return the case of this name, or else those that begin with it: `memory` is `memory-*`.

        Raises:
            BenchmarkError: there is none.
        """
        if all(case.name != name for case in self.cases):
            group = [case for case in self.cases if case.name.startswith(f"{name}-")]
            if group:
                return group
        return [self.case(name)]


@dataclass(frozen=True)
class Row:
    """The figures of a case; `ours[i]` and `peer[i]` were taken in the same round.

    `peer` is empty when the case has none.
    """

    benchmark: str
    case: Case
    ours: Sequence[float]
    peer: Sequence[float]

    @property
    def ratio(self) -> float | None:
        """Median of ours over median of the peer's; below 1 we are better; None without a peer."""
        if not self.peer:
            return None
        return statistics.median(self.ours) / statistics.median(self.peer)

    @property
    def paired(self) -> list[float]:
        """The ratio of each round; its spread says how far the median can be trusted."""
        if not self.peer:
            return []
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def met(self) -> bool | None:
        """Whether the goals are reached; None without a goal."""
        goals = []
        if self.case.goal is not None:
            goals.append(self.ratio is not None and self.ratio <= self.case.goal)
        if self.case.limit is not None:
            # A bound is for every run, not for the middle one.
            goals.append(max(self.ours) <= self.case.limit)
        return all(goals) if goals else None
