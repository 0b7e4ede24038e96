from __future__ import annotations

from datetime import UTC, datetime, timedelta

from offload_cache.objectstore import ObjectInfo
from offload_cache.packs.sweep import SweepPlan, plan_sweep

NOW = datetime(2030, 1, 31, tzinfo=UTC)


def listing(**days_old: float) -> dict[str, ObjectInfo]:
    """Return objects of 100 bytes by name with their age in days."""
    return {
        name: ObjectInfo(name, 100, NOW - timedelta(days=days)) for name, days in days_old.items()
    }


def plan(
    indexes: dict[str, ObjectInfo],
    packs: dict[str, ObjectInfo],
    marks: dict[str, ObjectInfo] | None = None,
    *,
    keep_bytes: int = 10_000,
    keep_days: float = 30,
) -> SweepPlan:
    return plan_sweep(
        indexes, packs, marks or {}, now=NOW, keep_bytes=keep_bytes,
        keep_seconds=keep_days * 86_400,
    )  # fmt: skip


def test_nothing_is_deleted_within_the_bounds() -> None:
    found = listing(a=29, b=1)
    assert plan(found, found) == SweepPlan(stored_bytes=200)


def test_a_pack_that_was_not_used_for_long_goes() -> None:
    found = listing(a=31, b=29)
    assert plan(found, found).packs == ["a"]


def test_a_pack_that_was_read_lately_stays() -> None:
    found = listing(a=300, b=31)
    assert plan(found, found, listing(a=2)).packs == ["b"]


def test_beyond_the_bound_those_go_that_were_not_used_for_longest() -> None:
    found = listing(a=9, b=8, c=7, d=6, e=5, f=4, g=3, h=2, i=1, j=0.5, k=0.1)
    result = plan(found, found, listing(a=1), keep_bytes=1_000)
    assert result.packs == ["b", "c"]  # one more than needed: a tenth of the bound is freed
    assert result.stored_bytes == 900


def test_packs_without_an_index_are_given_a_day() -> None:
    assert plan({}, listing(young=0.9, old=1.1)).packs == ["old"]


def test_a_pack_that_was_merged_today_can_be_read_today() -> None:
    assert plan({}, listing(a=20, b=20), listing(a=0.1)).packs == ["b"]


def test_an_index_and_a_mark_without_their_pack_go() -> None:
    result = plan(listing(a=1, b=1), listing(b=1), listing(b=1, c=1))
    assert (result.packs, result.marks) == (["a"], ["c"])
