"""Bytes that wait go together, in their order, and only so many of them."""

from __future__ import annotations

import asyncio

import pytest

from offload_core.gathering import FULL_BYTES, MOMENT_SECONDS, PAUSE_SECONDS, Gathering, Pace


async def test_what_waits_is_taken_together() -> None:
    gathering = Gathering()
    for data in (b"a", b"b", b"c"):
        await gathering.put(data)
    assert await gathering.take() == (b"a", b"b", b"c")
    gathering.end()
    assert await gathering.take() == ()


async def test_all_arrives_in_its_order_and_never_much_at_once() -> None:
    gathering = Gathering()
    parts = [bytes((number,)) * 300_000 for number in range(20)]

    async def put() -> None:
        for part in parts:
            await gathering.put(part)
        gathering.end()

    putting = asyncio.create_task(put())
    taken = []
    async with asyncio.timeout(30):
        while some := await gathering.take():
            assert sum(map(len, some)) <= FULL_BYTES
            taken.extend(some)
        await putting
    assert b"".join(taken) == b"".join(parts)


async def test_who_puts_waits_for_room_until_the_end() -> None:
    gathering = Gathering()
    await gathering.put(bytes(FULL_BYTES))
    putting = asyncio.create_task(gathering.put(b"more"))
    await asyncio.sleep(0)
    assert not putting.done()
    gathering.end()
    async with asyncio.timeout(10):
        await putting


def test_only_slow_copies_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("offload_core.gathering.monotonic", lambda: now)
    pace = Pace()

    def reads(size: int, every: float, *, count: int = 30) -> bool:
        nonlocal now
        for _ in range(count):
            now += every
            pace.read(size)
        return pace.rests

    assert not reads(100, 0.001)
    assert not reads(16 << 20, 0.001)
    assert reads(32 << 10, 0.001)
    assert pace.moment > MOMENT_SECONDS
    pace.answered()
    assert not reads(32 << 10, 0.001, count=1)
    # What comes after a pause is something else.
    assert reads(32 << 10, 0.001)
    assert not reads(32 << 10, 2 * PAUSE_SECONDS, count=1)
