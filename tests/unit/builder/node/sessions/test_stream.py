"""Connections to an engine whose requests are looked at."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import pytest

from offload_builder.node.sessions.guard.stream import GuardedStream
from offload_core.enginehttp import response
from offload_core.errors import NodeLostError, UsageError

SECONDS = 20


@contextlib.asynccontextmanager
async def engine(answer):
    """A server at a unix socket; `answer` gets its reader and writer."""
    tasks = []

    async def serve(reader, writer):
        tasks.append(asyncio.current_task())
        try:
            await answer(reader, writer)
        finally:
            writer.transport.abort()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        server = await asyncio.start_unix_server(serve, path)
        try:
            async with asyncio.timeout(SECONDS):
                yield path
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def heard(stream: GuardedStream, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := await stream.read()):
        data += more
    return data


async def echo(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def test_requests_and_what_follows_an_upgrade_pass_byte_for_byte():
    head = (
        b"POST /v1.47/containers/x/attach HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    )
    first = b"GET /v1.47/info HTTP/1.1\r\nHost: x\r\n\r\n"
    switched = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\n\r\n"

    async def answer(reader, writer):
        assert await reader.readuntil(b"\r\n\r\n") == first
        writer.write(response(200, b"{}"))
        assert await reader.readuntil(b"\r\n\r\n") == head
        writer.write(switched)
        await echo(reader, writer)

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, lambda _: None)
        await stream.write(first)
        await heard(stream, len(response(200, b"{}")))
        await stream.write(head)
        assert await heard(stream, len(switched)) == switched
        noise = b"\0 POST /containers/create \r\n\r\n" * 1000
        await stream.write(noise)
        assert await heard(stream, len(noise)) == noise
        await stream.end()
        assert await stream.read() == b""
        await stream.close()


async def test_after_an_upgrade_that_the_engine_refuses_requests_are_read_on():
    asked = []

    async def answer(reader, writer):
        for _ in range(2):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(response(404, b"{}"))

    seen = []

    def rules(head):
        seen.append(head.path)

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, rules)
        no = response(404, b"{}")
        await stream.write(
            b"POST /exec/x/start HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
        assert await heard(stream, len(no)) == no
        await stream.write(b"POST /containers/create HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        assert await heard(stream, len(no)) == no
        await stream.close()
    assert seen == ["/exec/x/start", "/containers/create"]


async def test_a_request_may_be_answered_or_changed_and_the_connection_goes_on():
    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: 3" in head
        assert b"chunked" not in head
        assert await reader.readexactly(3) == b"new"
        writer.write(b"engine")

    async def handle(exchange):
        if exchange.head.path == "/no":
            await exchange.read_body(10)
            raise UsageError("this is not for you", hint="ask")
        assert await exchange.read_body(10) == b"body"
        await exchange.pass_on(exchange.head.replaced(body_length=3), b"new")

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, lambda head: handle)
        await stream.write(b"POST /no HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody")
        refusal = await stream.read()
        assert refusal.startswith(b"HTTP/1.1 400 ")
        assert refusal.endswith(b'{"message": "this is not for you; ask"}\n')
        chunked = b"POST /yes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
        for at in range(len(chunked)):
            await stream.write(chunked[at : at + 1])
        assert await heard(stream, 6) == b"engine"
        await stream.close()


async def test_what_is_no_http_is_refused_and_ends_the_connection():
    got = asyncio.get_running_loop().create_future()

    async def answer(reader, writer):
        got.set_result(await reader.read())

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, lambda _: None)
        await stream.write(b"GET / HTTP/1.1\r\nbroken\r\n\r\n")
        assert (await stream.read()).startswith(b"HTTP/1.1 400 ")
        assert await stream.read() == b""
        with pytest.raises(OSError, match=r"\w"):
            await stream.write(b"x")
        await stream.close()
        assert await got == b""


async def test_a_large_body_passes_while_it_comes_and_waits_for_the_engine():
    size = 64 << 20
    slow = asyncio.Event()
    sent = 0

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await slow.wait()
        taken = 0
        while taken < size:
            taken += len(await reader.read(1 << 20))
        writer.write(b"all")

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, lambda _: None)

        async def send():
            nonlocal sent
            await stream.write(b"POST /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
            block = bytes(1 << 20)
            for _ in range(64):
                await stream.write(block)
                sent += 1

        sending = asyncio.create_task(send())
        done, _ = await asyncio.wait((sending,), timeout=0.5)
        assert not done
        assert sent <= 4
        slow.set()
        await sending
        assert await heard(stream, 3) == b"all"
        await stream.close()


async def test_where_there_is_little_room_a_piece_is_with_the_engine_before_the_next_one_is_taken():
    taking, taken = asyncio.Event(), 0
    # More than the buffers of the socket hold.
    size = 8 << 20

    async def answer(reader, writer):
        nonlocal taken
        await reader.readuntil(b"\r\n\r\n")
        await taking.wait()
        while taken < size:
            taken += len(await reader.read(1 << 20))
        writer.write(b"all")

    async with engine(answer) as path:
        stream = await GuardedStream.open(path, lambda _: None)
        await stream.write(b"POST /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size, 1 << 16)
        first = asyncio.create_task(stream.write(bytes(5 << 20), 1 << 16))
        done, _ = await asyncio.wait((first,), timeout=0.3)
        assert not done
        taking.set()
        await first
        for _ in range(3):
            await stream.write(bytes(1 << 20), 1 << 16)
        assert await heard(stream, 3) == b"all"
        assert taken == size
        await stream.close()


async def test_a_cut_ends_reading_and_writing():
    async with engine(echo) as path:
        stream = await GuardedStream.open(path, lambda _: None)
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        stream.cut()
        assert await reading == b""
        with pytest.raises(OSError, match="cut"):
            await stream.write(b"GET / HTTP/1.1\r\n\r\n")
        await stream.close()


async def test_an_engine_that_is_gone_is_named(tmp_path):
    with pytest.raises(NodeLostError, match="does not answer"):
        await GuardedStream.open(tmp_path / "nothing", lambda _: None)
