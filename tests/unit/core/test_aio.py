"""Patterns of asyncio."""

from __future__ import annotations

import asyncio

import pytest

from offload_core.aio import for_each, stop
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


async def test_stopped_tasks_have_ended_and_their_expected_errors_are_not_raised():
    async def broken() -> None:
        raise KeyError("lost")

    forever, failed = asyncio.ensure_future(asyncio.sleep(60)), asyncio.ensure_future(broken())
    await asyncio.sleep(0)
    await stop(forever, failed, expected=(LookupError,))
    assert forever.cancelled()
    assert failed.done()
    with pytest.raises(KeyError):
        await stop(failed)


async def test_who_stops_a_task_can_be_cancelled_meanwhile():
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
            raise

    task = asyncio.ensure_future(stubborn())
    await asyncio.sleep(0)
    stopping = asyncio.ensure_future(stop(task))
    await asyncio.sleep(0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not task.done()
    await asyncio.wait((task,))
