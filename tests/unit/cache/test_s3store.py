"""Answers of stores and of proxies before them that MinIO never gives."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from offload_cache.s3store import S3Config, S3Store
from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OBJECT = os.urandom(200)


@asynccontextmanager
async def cutting_store(sent: int) -> AsyncIterator[tuple[S3Store, list[tuple[int, int]]]]:
    """Yield a store that sends at most `sent` bytes, in a chunk, and cuts; and the ranges asked."""
    ranges: list[tuple[int, int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"[Rr]ange: bytes=(\d+)-(\d*)", head)
        assert found is not None
        first, last = int(found[1]), int(found[2] or len(OBJECT) - 1)
        ranges.append((first, last))
        part = OBJECT[first : last + 1][:sent]
        writer.write(
            b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"%x\r\n%s\r\n" % (len(part), part)
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = S3Store(S3Config(f"http://127.0.0.1:{port}", "bucket", "access", "secret"))
    try:
        yield store, ranges
    finally:
        await store.close()
        server.close()
        await server.wait_closed()


async def test_a_connection_that_breaks_after_the_last_byte_is_no_reason_to_read_more() -> None:
    async with cutting_store(sent=1000) as (store, ranges):
        got = bytearray()
        assert await store.read("k", got.extend, offset=10, length=50) == 50
        assert got == OBJECT[10:60]
        assert ranges == [(10, 59)]


async def test_a_connection_that_breaks_before_is_continued_once() -> None:
    async with cutting_store(sent=30) as (store, ranges):
        got = bytearray()
        assert await store.read("k", got.extend, offset=10, length=50) == 50
        assert got == OBJECT[10:60]
        with pytest.raises(CacheUnavailableError, match="the connection broke"):
            await store.read("k", got.extend, offset=10, length=100)
        assert ranges == [(10, 59), (40, 59), (10, 109), (40, 109)]


async def test_a_store_that_is_closed_leaves_no_thread_waiting_for_a_silent_one() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    store = S3Store(S3Config(f"http://127.0.0.1:{silent.getsockname()[1]}", "bucket", "a", "s"))
    known = set(threading.enumerate())
    try:
        asked = [
            asyncio.create_task(work)
            for work in (store.write_bytes("k", b"x"), store.delete("k"), store.stat("k"))
        ]
        await asyncio.sleep(0.2)
        assert len(set(threading.enumerate()) - known) == 3
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        started = time.monotonic()
        await store.close()
        while set(threading.enumerate()) - known:
            await asyncio.sleep(0.01)
            assert time.monotonic() - started < 2
    finally:
        silent.close()
