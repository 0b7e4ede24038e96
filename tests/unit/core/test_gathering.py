"""Bytes that wait go together, in their order, and only so many of them."""

from __future__ import annotations

import asyncio

from offload_core.gathering import FULL_BYTES, Gathering


async def test_what_waits_is_taken_together() -> None:
    gathering = Gathering()
    for data in (b"a", b"b", b"c"):
        await gathering.put(data)
    assert await gathering.take() == b"abc"
    gathering.end()
    assert await gathering.take() == b""


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
        while data := await gathering.take():
            assert len(data) <= FULL_BYTES
            taken.append(data)
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
