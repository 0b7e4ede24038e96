"""Bytes between a coroutine and a thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from offload_client.bytepipe import BytePipe, PipeAbortedError, in_thread, stream_through

_DATA = bytes(range(256)) * 20_000


async def test_reader_gets_every_byte_in_reads_of_any_size() -> None:
    async def produce(pipe: BytePipe) -> None:
        for start in range(0, len(_DATA), 70_001):
            await pipe.write(_DATA[start : start + 70_001])
        await pipe.write(_DATA)

    def consume(pipe: BytePipe) -> bytes:
        parts = [pipe.read(1), pipe.read(0), pipe.read(99_999)]
        assert [len(part) for part in parts] == [1, 0, 99_999]
        while part := pipe.read(1234):
            parts.append(part)
        assert pipe.read(5) == b""
        return b"".join(parts)

    assert await stream_through(produce, consume, name="test") == _DATA * 2


async def test_writer_waits_for_a_slow_reader() -> None:
    written = 0
    go = threading.Event()

    async def produce(pipe: BytePipe) -> None:
        nonlocal written
        for _ in range(40):
            await pipe.write(bytes(1 << 20))
            written += 1

    async def watch() -> int:
        await asyncio.sleep(0.2)
        seen = written
        go.set()
        return seen

    def consume(pipe: BytePipe) -> int:
        go.wait(10)
        return sum(len(piece) for piece in pipe)

    watching = asyncio.ensure_future(watch())
    assert await stream_through(produce, consume, name="test") == 40 << 20
    assert await watching == 8


async def test_producers_error_wins_over_the_readers() -> None:
    async def produce(pipe: BytePipe) -> None:
        await pipe.write(b"x")
        raise LookupError("source")

    def consume(pipe: BytePipe) -> None:
        try:
            for _ in pipe:
                pass
        except PipeAbortedError:
            raise ValueError("reader") from None

    with pytest.raises(LookupError, match="source"):
        await stream_through(produce, consume, name="test")


async def test_reader_that_ends_early_ends_the_producer() -> None:
    ended = asyncio.Event()

    async def produce(pipe: BytePipe) -> None:
        try:
            while True:
                await pipe.write(bytes(1 << 20))
        finally:
            ended.set()

    assert await stream_through(produce, lambda pipe: pipe.read(3), name="test") == bytes(3)
    assert ended.is_set()


async def test_cancellation_makes_the_reader_give_up() -> None:
    outcome: list[str] = []

    async def produce(pipe: BytePipe) -> None:
        await pipe.write(b"x")
        await asyncio.sleep(60)

    def consume(pipe: BytePipe) -> None:
        try:
            pipe.read()
        except PipeAbortedError:
            outcome.append("aborted")

    task = asyncio.ensure_future(stream_through(produce, consume, name="test"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcome == ["aborted"]


async def test_hanging_thread_does_not_hold_a_cancelled_caller() -> None:
    release = threading.Event()
    task = asyncio.ensure_future(_wait_for(release))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 1
    release.set()


async def _wait_for(event: threading.Event) -> bool:
    return await in_thread(lambda: event.wait(30), name="test")
