"""Streams of exporters: back-pressure, impatience, and an end that tells the truth."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from offload_builder.node.clientlink import ClientLink
from offload_builder.node.outputs import MESSAGE_BYTES, QUEUE_PIECES, Outputs, OutputStream
from offload_builder.node.solveplan import Exporter
from offload_core.errors import BuildFailedError, NotFoundError, QuotaExceededError, UsageError

PIECE = b"x" * MESSAGE_BYTES


async def stream_of(unopened: float = 5.0, stalled: float = 5.0):
    verdict = asyncio.get_running_loop().create_future()
    return OutputStream(3, verdict, unopened_seconds=unopened, stalled_seconds=stalled), verdict


async def read_all(stream: OutputStream) -> bytes:
    async with aclosing(stream.read()) as pieces:
        return b"".join([piece async for piece in pieces])


async def test_bytes_arrive_whole_and_end_with_the_verdict():
    stream, verdict = await stream_of()
    reading = asyncio.ensure_future(read_all(stream))
    for _ in range(100):
        await stream.write(b"0123456789" * 3000)
    await stream.close()
    await asyncio.sleep(0.01)
    assert not reading.done()
    verdict.set_result(None)
    assert await reading == b"0123456789" * 300_000


async def test_writer_waits_for_a_reader_that_is_behind():
    stream, _ = await stream_of()

    async def write() -> None:
        for _ in range(QUEUE_PIECES + 5):
            await stream.write(PIECE)

    writing = asyncio.ensure_future(write())
    await asyncio.sleep(0.05)
    assert not writing.done()
    async with aclosing(stream.read()) as pieces:
        for _ in range(6):
            await anext(pieces)
        await asyncio.wait_for(writing, 2)
    with pytest.raises(BuildFailedError, match="stopped reading output 3"):
        await stream.close()


@pytest.mark.parametrize("size", [1, (QUEUE_PIECES + 3) * MESSAGE_BYTES])
async def test_output_that_nobody_opens_is_given_up(size):
    stream, _ = await stream_of(unopened=0.1)
    with pytest.raises(BuildFailedError, match="has not read output 3"):
        for start in range(0, size, MESSAGE_BYTES):
            await stream.write(b"x" * min(MESSAGE_BYTES, size - start))
        await stream.close()


async def test_stalled_reader_is_given_up_and_a_slow_one_is_not():
    stream, verdict = await stream_of(unopened=0.1, stalled=0.3)

    async def slow() -> int:
        count = 0
        async with aclosing(stream.read()) as pieces:
            async for _ in pieces:
                count += 1
                await asyncio.sleep(0.1)
        return count

    reading = asyncio.ensure_future(slow())
    for _ in range(8):
        await stream.write(PIECE)
    await stream.close()
    verdict.set_result(None)
    assert await reading == 8

    stream, _ = await stream_of(unopened=0.1, stalled=0.2)
    async with aclosing(stream.read()) as pieces:
        await stream.write(PIECE)
        await anext(pieces)
        await stream.write(PIECE)
        with pytest.raises(BuildFailedError, match="has not read"):
            await stream.close()


async def test_failed_solve_ends_the_reader_with_its_cause_although_the_stream_was_closed():
    stream, verdict = await stream_of()
    reading = asyncio.ensure_future(read_all(stream))
    await stream.write(b"half an archive")
    await stream.close()
    verdict.set_result(QuotaExceededError("the cause"))
    with pytest.raises(QuotaExceededError, match="the cause"):
        await reading


async def test_aborted_stream_waits_for_the_cause():
    stream, verdict = await stream_of()
    reading = asyncio.ensure_future(read_all(stream))
    await stream.write(PIECE)
    await stream.abort()
    await asyncio.sleep(0.01)
    assert not reading.done()
    verdict.set_result(BuildFailedError("the cause"))
    with pytest.raises(BuildFailedError, match="the cause"):
        await reading
    with pytest.raises(BuildFailedError):
        await stream.write(PIECE)


async def test_aborted_stream_never_ends_well():
    stream, verdict = await stream_of()
    verdict.set_result(None)
    await stream.abort()
    with pytest.raises(BuildFailedError, match="given up"):
        await read_all(stream)


async def test_second_reader_is_refused_and_harms_nobody():
    stream, verdict = await stream_of()
    reading = asyncio.ensure_future(read_all(stream))
    await asyncio.sleep(0)
    with pytest.raises(UsageError, match="read already"):
        await read_all(stream)
    await stream.write(b"data")
    await stream.close()
    verdict.set_result(None)
    assert await reading == b"data"


async def test_outputs_are_announced_once_by_their_index_in_the_request():
    link = ClientLink()
    found = Outputs(link, [
        Exporter("image", {}, 0, streams=False),
        Exporter("tar", {}, 4, streams=True),
    ])  # fmt: skip
    assert not found.begun
    await found.open(1, {"a": "b"})
    ready = (await link.outbox.get()).output_ready
    assert (ready.output_index, dict(ready.metadata), found.begun) == (4, {"a": "b"}, True)
    for index in (0, 2, -1):
        with pytest.raises(NotFoundError):
            await found.open(index, {})
    with pytest.raises(UsageError, match="begun already"):
        await found.open(1, {})
    with pytest.raises(NotFoundError, match="no output number 0"):
        found.read(0)
    found.stop()
    with pytest.raises(BuildFailedError):
        async with aclosing(found.read(4)) as pieces:
            await anext(pieces)
