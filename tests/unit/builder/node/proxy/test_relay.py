"""Calls between two HTTP/2 connections with their own windows, headers and stream numbers."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.frames import PREFACE
from offload_builder.buildkit.h2.limits import ConnectionLimits
from offload_builder.buildkit.h2.messages import GrpcError, MessageReader
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError
from offload_builder.buildkit.sessiongreeting import greet, pass_without_preface, wrapped
from offload_builder.buildkit.sessionproxy import login_answer
from offload_builder.node.proxy.relay import daemon_stream, relay
from offload_proto.buildkit.control_pb2 import BytesMessage

HEADERS = [
    (":method", "POST"), (":scheme", "https"), (":path", "/a.B/C"), (":authority", "x"),
    ("te", "trailers"), ("x-many", "1"), ("x-many", "2"),
]  # fmt: skip


class Hop:
    """Two ends of one connection; what one sends reaches the other in pieces of any size."""

    def __init__(self, window, chance):
        limits = ConnectionLimits(receive_window=window)
        self.accepted = asyncio.Queue()
        self._random = chance
        # Both ways to hand in what was received.
        self._own_buffer = chance.random() < 0.5
        self.client = Http2Connection(self._to_server, client=True, limits=limits)
        self.server = Http2Connection(
            self._to_client, client=False, on_stream=self.accepted.put_nowait, limits=limits
        )

    async def _to_server(self, pieces):
        await self._deliver(self.server, b"".join(pieces))

    async def _to_client(self, pieces):
        await self._deliver(self.client, b"".join(pieces))

    async def _deliver(self, target, data):
        position = 0
        while position < len(data):
            size = self._random.choice((1, 9, 100, 20_000, 1 << 20))
            piece = data[position : position + size]
            position += len(piece)
            if self._own_buffer:
                while piece:
                    room = target.room()
                    size = min(len(room), len(piece))
                    room[:size] = piece[:size]
                    target.filled(size)
                    piece = piece[size:]
            else:
                target.feed(piece)
        await asyncio.sleep(0)

    async def __aenter__(self):
        self.client.start()
        self.server.start()
        return self

    async def __aexit__(self, *_):
        await self.client.close()
        await self.server.close()

    async def stream(self, headers=HEADERS):
        ours = self.client.open_stream(headers)
        return ours, await asyncio.wait_for(self.accepted.get(), 5)


async def serve(client_side, connection):
    with daemon_stream(connection, client_side.headers) as daemon_side:
        await relay(client_side, daemon_side)


@contextlib.asynccontextmanager
async def joined(outer_window=1 << 20, inner_window=1 << 20, seed=1):
    chance = random.Random(seed)
    async with Hop(outer_window, chance) as outer, Hop(inner_window, chance) as inner:
        client, client_side = await outer.stream()
        # Numbers of the two connections differ.
        await inner.stream()
        task = asyncio.ensure_future(serve(client_side, inner.client))
        daemon = await asyncio.wait_for(inner.accepted.get(), 5)
        try:
            yield client, daemon, task, outer, inner
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StreamResetError):
                await task


async def read_all(stream, chance):
    data = b""
    while piece := await stream.read():
        data += piece
        if chance.random() < 0.2:
            await asyncio.sleep(0)
    return data


async def send_all(stream, pieces):
    for piece in pieces:
        await stream.write([piece])
    stream.end()


sizes = st.lists(st.integers(0, 150_000), max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    up=sizes,
    down=sizes,
    outer=st.sampled_from([65_536, 100_000, 1 << 20]),
    inner=st.sampled_from([65_536, 1 << 20, 8 << 20]),
    seed=st.integers(0, 1 << 16),
)
def test_every_byte_arrives_once_and_in_order_whatever_the_windows(up, down, outer, inner, seed):
    async def run():
        chance = random.Random(seed)
        upward = [chance.randbytes(size) for size in up]
        downward = [chance.randbytes(size) for size in down]
        async with joined(outer, inner, seed) as (client, daemon, task, *hops):
            daemon.send_headers([(":status", "200"), ("x-note", "1")])

            async def serve():
                async with asyncio.TaskGroup() as group:
                    received = group.create_task(read_all(daemon, chance))
                    for piece in downward:
                        await daemon.write([piece])
                # A server that ends its answer early asks the client to send no more.
                daemon.end([("grpc-status", "0")])
                return received.result()

            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                group.create_task(send_all(client, upward))
                sent = group.create_task(serve())
                got = group.create_task(read_all(client, chance))
            assert sent.result() == b"".join(upward)
            assert got.result() == b"".join(downward)
            assert client.trailers == [("grpc-status", "0")]
            await asyncio.wait_for(task, 5)
            # Nothing leaks away: what was received was read, on all four ends.
            for hop in hops:
                assert hop.client._unread == 0
                assert hop.server._unread == 0

    asyncio.run(run())


async def test_metadata_is_passed_on_but_for_the_hop():
    async with joined() as (_client, daemon, *_):
        assert daemon.headers == [
            (":scheme", "http"), (":authority", "localhost"), (":method", "POST"),
            (":path", "/a.B/C"), ("te", "trailers"), ("x-many", "1"), ("x-many", "2"),
        ]  # fmt: skip


async def test_an_answer_without_data_is_one_header_block():
    async with joined() as (client, daemon, task, *_):
        daemon.end([(":status", "200"), ("grpc-status", "5"), ("grpc-message", "no")])
        await asyncio.wait_for(task, 5)
        assert await client.read() == b""
        assert ("grpc-status", "5") in client.headers


async def test_cancelling_the_relay_resets_the_daemons_stream():
    async with joined() as (_client, daemon, task, *_):
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(StreamResetError):
            await asyncio.wait_for(daemon.read(), 5)


async def test_a_lost_daemon_ends_the_relay_with_that_error():
    async with joined() as (_client, _daemon, task, _outer, inner):
        inner.client.lose("killed")
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(task, 5)


async def test_a_client_that_reads_nothing_holds_up_the_daemon_within_the_windows():
    async with joined() as (client, daemon, _task, outer, inner):
        daemon.send_headers([(":status", "200")])
        sent = 0

        async def flood():
            nonlocal sent
            while True:
                await daemon.write([b"x" * 65_536])
                sent += 65_536

        task = asyncio.ensure_future(flood())
        await asyncio.sleep(0.3)
        task.cancel()
        assert sent < 8 << 20
        assert outer.client._unread + inner.client._unread < 3 << 20
        client.reset()


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 60), max_size=6),
    rest=st.binary(max_size=200),
    seed=st.integers(0, 1 << 16),
)
def test_a_daemons_preface_is_left_out_wherever_it_is_cut(cuts, rest, seed):
    async def run():
        chance = random.Random(seed)
        async with Hop(1 << 20, chance) as outer, Hop(1 << 20, chance) as inner:
            client, client_side = await outer.stream()
            daemon_side, daemon = await inner.stream()
            begun = PREFACE + rest
            pieces, position = [], 0
            for cut in [*cuts, len(begun)]:
                pieces += wrapped([begun[position : position + cut]])
                position += cut
            data = b"".join(pieces)
            daemon.send_headers([(":status", "200")])
            for start in range(0, len(data), 11):
                await daemon.write([data[start : start + 11]])
            daemon.end([("grpc-status", "0")])
            await pass_without_preface(daemon_side, client_side)
            await relay(client_side, daemon_side, request=False, answered=True)
            got = b""
            while piece := await client.read():
                got += piece
            seen = b"".join(
                BytesMessage.FromString(message).data for message in MessageReader().feed(got)
            )
            assert seen == rest
            assert client.trailers == [("grpc-status", "0")] or client.headers

    asyncio.run(run())


async def test_a_client_is_greeted_before_any_daemon_is_there():
    async with Hop(1 << 20, random.Random(1)) as outer:
        client, client_side = await outer.stream()
        await greet(client_side)
        assert (":status", "200") in await client.wait_headers()
        (message,) = MessageReader().feed(await client.read())
        assert BytesMessage.FromString(message).data.startswith(PREFACE)


async def test_a_session_sends_no_endless_login():
    hop = Hop(1 << 20, random.Random(1))
    hop.client.start()
    hop.server.start()
    stream = hop.client.open_stream(HEADERS)
    answer = await hop.accepted.get()
    answer.send_headers([(":status", "200")])
    sending = asyncio.ensure_future(answer.write([bytes(1 << 20)]))
    with pytest.raises(GrpcError, match="too much"):
        await login_answer(stream)
    stream.reset()
    with contextlib.suppress(StreamResetError):
        await sending
    await hop.client.close()
    await hop.server.close()
