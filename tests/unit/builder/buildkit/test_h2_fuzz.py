"""Any bytes at all: nothing raises, nothing hangs, and memory stays bounded."""

from __future__ import annotations

import asyncio

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.messages import GrpcError, MessageReader
from offload_builder.buildkit.h2.server import GrpcServer

REQUEST = hpack.Encoder().encode([(":method", "POST"), (":path", "/t/Echo")])
ANSWER = hpack.Encoder().encode([(":status", "200"), ("content-type", "application/grpc")])

payloads = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([REQUEST, ANSWER, b"", bytes(4), bytes(8), b"\0\0\0\0\5hello", b"\x7f" * 4]),
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2**32 - 1)), max_size=3).map(
        lambda pairs: frames.settings_frame(dict(pairs))[9:]
    ),
    st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4)),
)
a_frame = st.builds(
    frames.frame,
    st.integers(0, 11),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x25, 0xFF]),
    st.sampled_from([0, 1, 1, 1, 3, 3, 5, 2, 2**31 - 1]),
    payloads,
)
pieces = st.lists(st.one_of(a_frame, a_frame, a_frame, st.binary(max_size=30)), max_size=25)


async def echo(call) -> None:
    while messages := await call.receive():
        await call.send(messages)


async def play(data: bytes, sizes: list[int], *, client: bool) -> None:
    """Feed a connection with what a peer could send, cut anywhere."""
    failures: list[str] = []

    async def sink(parts: list) -> None:
        assert sum(map(len, parts)) < 1 << 20
        await asyncio.sleep(0)

    server = GrpcServer({"/t/Echo": echo}, lambda method, error: failures.append(method))
    connection = Http2Connection(sink, client=client, on_stream=None if client else server.accept)
    connection.start()
    streams = []
    if client:
        streams = [connection.open_stream([(":method", "POST")]) for _ in range(2)]
        for stream in streams:
            await stream.write([b"x" * 1000])
    else:
        connection.feed(frames.PREFACE)
    position = 0
    while position < len(data):
        size = sizes[position % len(sizes)]
        connection.feed(data[position : position + size])
        position += size
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(stream.failed for stream in streams) or not connection.lost
    await asyncio.wait_for(server.close(), 5)
    await asyncio.wait_for(connection.close(0.05), 5)
    assert connection.ended.is_set()
    assert connection.lost or not connection.usable


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
def test_no_bytes_of_a_peer_raise_or_hang(client):
    @settings(deadline=None, max_examples=250)
    @given(pieces, st.lists(st.sampled_from([1, 3, 9, 50, 10_000]), min_size=1, max_size=5))
    def check(parts, sizes):
        asyncio.run(play(b"".join(parts), sizes, client=client))

    check()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=10))
def test_no_bytes_of_a_call_raise_anything_but_a_status(parts):
    reader = MessageReader()
    try:
        for part in parts:
            reader.feed(part)
    except GrpcError:
        pass
