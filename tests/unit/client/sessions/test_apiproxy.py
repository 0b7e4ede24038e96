"""Connections of docker clients to the socket of a session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from offload_client.sessions.apiproxy import ApiProxy
from offload_client.sessions.interception import Interception
from offload_client.sessions.tunnel import Tunnel
from offload_core.enginehttp import RequestHead, RequestReader, response
from offload_core.errors import NodeLostError

LOG = logging.getLogger("test")
PATIENCE = 20.0


class Away:
    """A tunnel to a node that is away."""

    async def engine(self) -> Any:
        raise NodeLostError("the session cannot be reached")


class Answers:
    """Answers what is asked for in place of an engine, except for what passes."""

    def find(self, head: RequestHead) -> Any:
        return None if head.path == "/pass" else self._answer

    async def _answer(self, head: RequestHead, requests: RequestReader, send: Any) -> None:
        body = await requests.read_body(1 << 20)
        await send(response(200, body))
        if head.path == "/broken":
            raise NodeLostError("the node was lost")


@asynccontextmanager
async def connected(
    directory: Path,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    path = directory / "engine.sock"
    tunnel, interception = cast("Tunnel", Away()), cast("Interception", Answers())
    async with ApiProxy(path, tunnel, interception, LOG), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            yield reader, writer
        finally:
            writer.close()


async def test_a_client_that_waits_for_leave_to_send_gets_it(tmp_path: Path) -> None:
    async with connected(tmp_path) as (reader, writer):
        writer.write(b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ab")
        assert (await reader.readuntil(b"ab")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /a HTTP/1.1\r\nConnection: Close\r\n\r\n",
        b"POST /a HTTP/1.0\r\n\r\n",
        b"POST /a HTTP/1.0\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_client_that_reads_until_the_end_sees_one(tmp_path: Path, head: bytes) -> None:
    async with connected(tmp_path) as (reader, writer):
        writer.write(head)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


async def test_a_connection_is_kept_for_whoever_wants_it(tmp_path: Path) -> None:
    async with connected(tmp_path) as (reader, writer):
        for _ in range(3):
            writer.write(b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\nab")
            assert (await reader.readuntil(b"ab")).startswith(b"HTTP/1.1 200 ")


async def test_an_answer_that_has_begun_gets_no_other_one_behind_it(tmp_path: Path) -> None:
    async with connected(tmp_path) as (reader, writer):
        writer.write(b"POST /broken HTTP/1.1\r\nContent-Length: 2\r\n\r\nab")
        assert (await reader.read()).count(b"HTTP/1.1") == 1


async def test_who_sends_much_hears_why_the_node_cannot_be_reached(tmp_path: Path) -> None:
    async with connected(tmp_path) as (reader, writer):
        writer.write(b"POST /pass HTTP/1.1\r\nContent-Length: 30000000\r\n\r\n")
        for _ in range(30):
            writer.write(bytes(1_000_000))
            await writer.drain()
        assert b"cannot be reached" in await reader.read()
