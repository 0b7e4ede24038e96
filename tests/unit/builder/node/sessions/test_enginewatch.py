"""How containers of an engine are counted, however much it says."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager

from offload_builder.node.sessions.enginewatch import (
    BYTES_PER_SECOND,
    MANY,
    MAX_LIST,
    running_containers,
    watch_containers,
)
from tests.fixtures.standinengine import StandInEngine


class Talker(StandInEngine):
    """Lists so many bytes, and sends events without an end."""

    listed_bytes = 0
    lists = 0
    event_bytes = 0

    def _answer(self, writer: asyncio.StreamWriter, value: object) -> None:
        del value
        self.lists += 1
        body = json.dumps(["c" * self.listed_bytes]).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def _events(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"3\r\n{}\n\r\n" * 1000)
            self.event_bytes += 8000
            await writer.drain()


@asynccontextmanager
async def talker(tmp_path, listed_bytes=0):
    engine = Talker("e1", tmp_path)
    engine.listed_bytes = listed_bytes
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def test_a_list_that_is_too_long_counts_as_use(tmp_path):
    async with talker(tmp_path, MAX_LIST) as engine:
        assert await running_containers(engine) == MANY
        engine.listed_bytes = 10
        assert await running_containers(engine) == 1


async def test_an_engine_that_never_stops_talking_is_heard_at_a_bounded_pace(tmp_path):
    told = asyncio.Event()
    size = MAX_LIST // 2
    async with talker(tmp_path, size) as engine:
        watching = asyncio.create_task(watch_containers(engine, lambda _: told.set()))
        await asyncio.wait_for(told.wait(), 30)
        began = time.monotonic()
        await asyncio.sleep(1.0)
        watching.cancel()
        await asyncio.wait((watching,))
        seconds = time.monotonic() - began
        assert engine.lists <= 1 + seconds * BYTES_PER_SECOND / size
        # Beside what is read there is what buffers on the way hold.
        assert engine.event_bytes < (4 << 20) + 10 * seconds * BYTES_PER_SECOND
