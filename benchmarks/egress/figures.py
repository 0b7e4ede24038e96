"""Figures of many small things in one round."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MIDDLE, SLOWEST = 0.5, 0.99


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by this share of all."""
    ordered = sorted(values)
    rank = -int(-share * len(ordered) // 1)
    return ordered[max(rank, 1) - 1]
