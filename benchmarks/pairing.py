"""Measuring several commands in turn, so that a machine that slows down slows all of them down."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """Return in which order a round runs.

    Two rounds each, forwards and backwards, then the next one begins: everybody is first equally
    often, and nobody always comes after the same other one.
    """
    shift = number // 2 % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if number % 2 else order


def interleave(
    contestants: Mapping[str, Callable[[int], float]],
    *,
    runs: int,
    warmups: int,
    show: Callable[[int, str, float], None],
) -> dict[str, list[float]]:
    """Run all contestants once per round and return their figures, in the order of rounds.

    Args:
        contestants: by name, a function of the round's number.
        runs: counted rounds.
        warmups: rounds before that are not counted.
        show: told of every run, warm-ups too.
    """
    names = list(contestants)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmups + runs):
        for name in turn_order(names, number):
            figure = contestants[name](number)
            show(number, name, figure)
            if number >= warmups:
                figures[name].append(figure)
    return figures
