"""Patterns of asyncio."""

from __future__ import annotations

import asyncio

import pytest

from offload_core.aio import for_each
from offload_core.errors import NotFoundError


async def test_for_each_does_all_with_so_many_at_a_time() -> None:
    running, most, done = 0, 0, []

    async def work(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(item)

    await for_each(range(10), work, parallel=3)
    assert sorted(done) == list(range(10))
    assert most == 3


async def test_for_each_ends_with_the_first_error_of_ours() -> None:
    begun = []

    async def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise NotFoundError("there is no 2")
        await asyncio.sleep(0)

    with pytest.raises(NotFoundError, match="there is no 2"):
        await for_each(range(100), work, parallel=2)
    assert len(begun) < 10
