"""Bounds of projects and times of steps in the gateway's database."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from offload_builder.gateway.projectbounds import BoundsTable, ProjectBounds, limits_message
from offload_builder.gateway.steptimes import MAX_STEPS_PER_PROJECT, StepTimes
from offload_builder.gateway.store import Store, default_url
from offload_core.errors import UsageError
from offload_proto.v1.nodes_service_pb2 import StepTime

if TYPE_CHECKING:
    from pathlib import Path


def ran(*steps: tuple[str, int]) -> list[StepTime]:
    return [StepTime(key=key, milliseconds=value) for key, value in steps]


def cached(*keys: str) -> list[StepTime]:
    return [StepTime(key=key, milliseconds=1, cached=True) for key in keys]


async def test_bounds_are_set_one_by_one_and_taken_back(tmp_path: Path):
    async with Store(default_url(tmp_path)) as store:
        table = BoundsTable(store)
        await table.change("shop", shared_keep_bytes=100, shared_idle_seconds=60)
        assert await table.change("shop", node_keep_bytes=7) == ProjectBounds("shop", 100, 60, 7)
        await table.change("shop", shared_keep_bytes=0, shared_idle_seconds=0)
        assert await table.all() == {"shop": ProjectBounds("shop", node_keep_bytes=7)}
        await table.change("shop", node_keep_bytes=0)
        assert await table.all() == {}


async def test_impossible_bound_is_refused(tmp_path: Path):
    async with Store(default_url(tmp_path)) as store:
        for value in (-1, 1 << 63):
            with pytest.raises(UsageError):
                await BoundsTable(store).change("shop", shared_keep_bytes=value)


async def test_database_of_before_gets_the_new_tables(tmp_path: Path):
    async with Store(default_url(tmp_path)):
        pass
    with sqlite3.connect(tmp_path / "gateway.sqlite") as database:
        database.execute("DROP TABLE project_bounds")
        database.execute("DROP TABLE step_times")
    database.close()
    async with Store(default_url(tmp_path)) as store:
        assert await BoundsTable(store).all() == {}
        assert await StepTimes(store).note("shop", ran(("a", 5))) == 0


def test_nodes_get_all_bounds_in_one_message():
    message = limits_message({"shop": ProjectBounds("shop", 100, 3600, 7)})
    (limit,) = message.projects
    assert (limit.project_id, limit.shared_keep_bytes, limit.node_keep_bytes) == ("shop", 100, 7)
    assert limit.shared_idle.seconds == 3600


async def test_cached_steps_save_the_time_that_they_last_took(tmp_path: Path):
    async with Store(default_url(tmp_path)) as store:
        times = StepTimes(store)
        assert await times.note("shop", ran(("a", 500), ("b", 70))) == 0
        assert await times.note("shop", cached("a", "b", "never-ran")) == 570
        assert await times.note("shop", [*ran(("a", 100)), *cached("b")]) == 70
        assert await times.note("shop", cached("a")) == 100
        assert await times.note("other", cached("a")) == 0


async def test_repeated_news_changes_nothing(tmp_path: Path):
    async with Store(default_url(tmp_path)) as store:
        times = StepTimes(store)
        news = [*ran(("a", 100), ("a", 100)), *cached("b")]
        await times.note("shop", ran(("b", 9)))
        assert [await times.note("shop", news) for _ in range(2)] == [9, 9]


async def test_steps_that_ran_longest_ago_are_forgotten(tmp_path: Path):
    async with Store(default_url(tmp_path)) as store:
        times = StepTimes(store)
        await times.note("shop", ran(("first", 1)))
        for start in range(0, MAX_STEPS_PER_PROJECT, 1000):
            keys = range(start, start + 1000)
            await times.note("shop", ran(*((f"step-{key}", 1) for key in keys)))
        assert await times.note("shop", cached("first", "step-0", "step-4999")) == 2
