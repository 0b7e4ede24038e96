"""Heads and bodies of HTTP between docker clients and engines."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_core.enginehttp import (
    MAX_HEAD,
    RequestHead,
    RequestReader,
    ResponseReader,
    error_response,
    response,
)
from offload_core.errors import UsageError


def source(*blocks: bytes) -> Callable[[], Awaitable[bytes]]:
    waiting = list(blocks)

    async def receive() -> bytes:
        return waiting.pop(0) if waiting else b""

    return receive


async def whole(reader: RequestReader) -> bytes:
    return b"".join([piece async for piece in reader.body()])


async def read_head(text: bytes) -> RequestHead:
    head = await RequestReader(source(text)).head()
    assert head is not None
    return head


CREATE = (
    b"POST /v1.47/containers/create?name=x&platform= HTTP/1.1\r\n"
    b"Host: api.moby.localhost\r\ncontent-type: application/json\r\nContent-Length: 8\r\n\r\n"
)
LOAD = b"POST /images/load HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"5;x=y\r\nhello\r\n1A\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nX-Sum: 1\r\n\r\n"


async def test_a_head_says_what_is_asked_for() -> None:
    head = await read_head(CREATE + b'{"A": 1}')
    assert (head.method, head.path) == ("POST", "/containers/create")
    assert head.target.startswith("/v1.47/")
    assert head.query == {"name": ["x"], "platform": [""]}
    assert head.header("Content-Type") == "application/json"
    assert head.header("Accept") == ""
    assert head.raw == CREATE
    assert not head.upgrades


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/_ping", "/_ping"),
        ("/v1.51/%63ontainers/create", "/containers/create"),
        ("/v1.51/v1.51/info", "/v1.51/info"),
        ("http://docker/v1.24/info?a=/v1/x", "/info"),
        ("/volumes/v1.2/x", "/volumes/v1.2/x"),
    ],
)
async def test_a_path_is_what_the_engine_takes_it_for(target: str, path: str) -> None:
    assert (await read_head(f"GET {target} HTTP/1.1\r\n\r\n".encode())).path == path


async def test_an_upgrade_leaves_what_follows_to_its_reader() -> None:
    reader = RequestReader(
        source(
            b"POST /containers/a/attach HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nra",
            b"w",
        )
    )
    head = await reader.head()
    assert head is not None
    assert head.upgrades
    assert reader.rest() == b"ra"
    assert reader.rest() == b""


@given(cuts=st.lists(st.integers(1, 400), max_size=12), second=st.sampled_from([CREATE, LOAD]))
async def test_requests_end_where_they_end_however_they_are_cut(
    cuts: list[int], second: bytes
) -> None:
    stream = CREATE + b'{"A": 1}' + LOAD + CHUNKS + b"GET /_ping HTTP/1.1\r\n\r\n"
    stream += second + (CHUNKS if second is LOAD else b"12345678")
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    blocks = [stream[a:b] for a, b in itertools.pairwise(places)]
    reader = RequestReader(source(*blocks))
    seen = b""
    while (head := await reader.head()) is not None:
        seen += head.raw + await whole(reader)
    assert seen == stream


@given(size=st.integers(1, 60))
async def test_a_chunked_body_is_read_without_its_framing(size: int) -> None:
    stream = LOAD + CHUNKS + b"GET /_ping HTTP/1.1\r\n\r\n"
    blocks = [stream[at : at + size] for at in range(0, len(stream), size)]
    reader = RequestReader(source(*blocks))
    await reader.head()
    assert await reader.read_body(31) == b"helloabcdefghijklmnopqrstuvwxyz"
    head = await reader.head()
    assert head is not None
    assert head.path == "/_ping"


HEAD = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
WRONG = (
    b"1\r\na\r\n+1\r\nb\r\n0\r\n\r\n",
    b"1\r\na\r\n1\nb\r\n0\r\n\r\n",
    b"1\r\na\r\n1;x\ry\r\nb\r\n0\r\n\r\n",
    b"1\r\na\r\n\r\nb\r\n0\r\n\r\n",
    b"1\r\na\n1\r\nb\r\n0\r\n\r\n",
    b"1\r\na\r\n1;" + b"x" * 5000 + b"\r\nb\r\n0\r\n\r\n",
    b"1\r\na\r\n1\r\nb\r\n",
)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("body", WRONG, ids=range(len(WRONG)))
async def test_wrong_line_between_chunks_is_refused_however_it_comes(
    body: bytes, size: int
) -> None:
    reader = RequestReader(source(*(body[at : at + size] for at in range(0, len(body), size))))
    reader._ahead = HEAD
    await reader.head()
    with pytest.raises(UsageError):
        await whole(reader)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    extension=st.sampled_from([b"", b";a=b", b" ", b";" + b"x" * 4000]),
    size=st.integers(1, 200),
)
async def test_chunks_are_the_same_however_they_come(
    chunks: list[bytes], extension: bytes, size: int
) -> None:
    lines = [b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
    body = b"".join(lines) + b"0\r\n\r\n"
    stream = HEAD + body + b"GET /_ping HTTP/1.1\r\n\r\n"
    reader = RequestReader(source(*(stream[at : at + size] for at in range(0, len(stream), size))))
    at_once = RequestReader(source(stream))
    for one in (reader, at_once):
        await one.head()
    assert await whole(reader) == await whole(at_once) == body
    following = await at_once.head()
    assert following is not None and following.path == "/_ping"


async def test_what_nobody_read_of_a_body_is_dropped() -> None:
    reader = RequestReader(source(CREATE, b'{"A"', b": 1}GET /a HTTP/1.1\r\n\r\n"))
    await reader.head()
    head = await reader.head()
    assert head is not None
    assert head.path == "/a"


async def test_a_body_beyond_its_limit_is_refused() -> None:
    reader = RequestReader(source(LOAD + CHUNKS))
    await reader.head()
    with pytest.raises(UsageError, match="more than 30 bytes"):
        await reader.read_body(30)


@pytest.mark.parametrize(
    "text",
    [
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET /a HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /a HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        b"GET  /a HTTP/1.1\r\n\r\n",
        b"\r\nGET /a HTTP/1.1\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST /a HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nA: " + b"b" * MAX_HEAD + b"\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost",
        b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\na",
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(text: bytes) -> None:
    reader = RequestReader(source(text))
    with pytest.raises(UsageError):
        while await reader.head() is not None:
            await whole(reader)


async def test_a_request_can_be_sent_on_with_another_body() -> None:
    head = await read_head(
        LOAD.replace(b"\r\n\r\n", b"\r\nX-Registry-Auth: a\r\nExpect: 100-continue\r\n\r\n")
    )
    assert head.replaced(
        target="/v1.47/images/load", body_length=3, headers={"x-registry-auth": "b"}
    ) == (
        b"POST /v1.47/images/load HTTP/1.1\r\nHost: a\r\nx-registry-auth: b\r\n"
        b"Content-Length: 3\r\n\r\n"
    )


async def test_responses_are_read_in_order() -> None:
    reader = ResponseReader(
        source(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
            error_response(404, "No such container: x"),
            response(200, b"a", "text/plain", headers={"Api-Version": "1.47"}),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
            b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n",
            b"HTTP/1.1 200\r\n\r\nto the ",
            b"end",
        )
    )
    assert (await reader.head()).status == 204
    assert (await reader.head()).status == 404
    assert json.loads(await reader.read_body(100)) == {"message": "No such container: x"}
    head = await reader.head()
    assert (head.header("api-version"), await reader.read_body(1)) == ("1.47", b"a")
    await reader.head()
    content = b"".join([piece async for piece in reader.content()])
    assert content == b"helloabcdefghijklmnopqrstuvwxyz"
    assert (await reader.head("HEAD")).status == 200
    await reader.head()
    assert await reader.read_body(100) == b"to the end"
    with pytest.raises(UsageError):
        await reader.head()


async def test_a_body_passes_as_it_comes() -> None:
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    reader = RequestReader(arrived.get)
    arrived.put_nowait(LOAD + b"5\r\nhe")
    await reader.head()
    async with contextlib.aclosing(reader.body()) as pieces:
        assert await anext(pieces) == b"5\r\nhe"
        arrived.put_nowait(b"llo\r\n0\r\n\r\nrest")
        assert await anext(pieces) == b"llo\r\n0\r\n\r\n"
    assert reader.rest() == b"rest"
