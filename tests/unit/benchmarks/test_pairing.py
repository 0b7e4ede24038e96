from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.pairing import interleave, turn_order


@pytest.mark.parametrize("count", [2, 3, 4])
def test_everybody_begins_equally_often(count: int) -> None:
    names = [str(number) for number in range(count)]
    firsts = Counter(turn_order(names, number)[0] for number in range(2 * count))
    assert set(firsts.values()) == {2}
    assert set(firsts) == set(names)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_contestant_always_comes_after_the_same_other_one(count: int) -> None:
    names = [str(number) for number in range(count)]
    before: dict[str, set[str]] = {name: set() for name in names}
    for number in range(2 * count):
        order = turn_order(names, number)
        assert sorted(order) == names
        for first, second in pairwise(order):
            before[second].add(first)
    assert all(len(others) > 1 or count == 2 for others in before.values())
    assert all(before.values())


def test_warm_ups_are_shown_but_not_counted() -> None:
    shown: list[tuple[int, str]] = []
    figures = interleave(
        {"a": float, "b": lambda number: number + 0.5},
        runs=3,
        warmups=2,
        show=lambda number, name, _: shown.append((number, name)),
    )
    assert figures == {"a": [2.0, 3.0, 4.0], "b": [2.5, 3.5, 4.5]}
    assert len(shown) == 10
