"""Calls of our own to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from offload_core.aio import TaskSet
from offload_core.enginecalls import (
    EngineReply,
    UnixConnection,
    call_engine,
    exchange,
    json_lines,
    stream_engine,
)
from offload_core.enginehttp import RequestReader, error_response, response
from offload_core.errors import NodeLostError, UsageError


@asynccontextmanager
async def small_engine(directory: Path) -> AsyncIterator[Path]:
    """Listen as an engine that knows three paths."""

    serving = TaskSet()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestReader(partial(reader.read, 65536))
        while (head := await requests.head()) is not None:
            body = await requests.read_body(1 << 20)
            if head.path == "/echo":
                writer.write(response(200, body))
            elif head.path == "/events":
                writer.write(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b'6\r\n{"a":1\r\n4\r\n}\n{}\r\n1\r\n\n\r\n0\r\n\r\n'
                )
            elif head.path == "/silent":
                continue
            else:
                writer.write(error_response(404, "page not found"))
            await writer.drain()
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.start(serve(reader, writer), name="serve")

    socket = directory / "s"
    server = await asyncio.start_unix_server(accept, path=str(socket))
    try:
        yield socket
    finally:
        server.close()
        await serving.drain(5)
        await serving.close()


async def test_a_call_returns_what_the_engine_says(tmp_path: Path) -> None:
    async with small_engine(tmp_path) as socket:
        connect = partial(UnixConnection.open, socket)
        reply = await call_engine(connect, "POST", "/v1.47/echo", b'{"x": [1]}')
        assert (reply.status, reply.json()) == (200, {"x": [1]})
        missing = await call_engine(connect, "GET", "/nowhere")
        assert (missing.status, missing.message) == (404, "page not found")
        with pytest.raises(UsageError):
            await call_engine(connect, "POST", "/echo", b"x" * 100, limit=99)


async def test_a_connection_takes_one_call_after_the_other(tmp_path: Path) -> None:
    async with small_engine(tmp_path) as socket:
        connection = await UnixConnection.open(socket)
        for text in (b"one", b"two"):
            assert (await exchange(connection, "POST", "/echo", text)).body == text
        await connection.aclose()


async def test_an_engine_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    async with small_engine(tmp_path) as socket:
        connect = partial(UnixConnection.open, socket)
        with pytest.raises(NodeLostError, match="did not answer"):
            await call_engine(connect, "GET", "/silent", timeout=0.2)
    with pytest.raises(NodeLostError, match="does not answer"):
        await UnixConnection.open(tmp_path / "none")


async def test_a_stream_gives_its_lines_as_they_come(tmp_path: Path) -> None:
    async with small_engine(tmp_path) as socket:
        connect = partial(UnixConnection.open, socket)
        async with stream_engine(connect, "/events") as pieces:
            assert [line async for line in json_lines(pieces)] == [{"a": 1}, {}]
        with pytest.raises(NodeLostError, match="page not found"):
            async with stream_engine(connect, "/nothing"):
                pass


async def test_what_is_nested_too_deep_is_no_json() -> None:
    deep = b"[" * 100_000
    reply = EngineReply(500, (), deep)

    async def pieces() -> AsyncIterator[bytes]:
        yield deep + b"\n"

    assert reply.message == ""
    with pytest.raises(UsageError):
        reply.json()
    with pytest.raises(UsageError):
        async for _ in json_lines(pieces()):
            """None comes."""
