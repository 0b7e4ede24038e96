"""What a client out in the world can make a connection do."""

from __future__ import annotations

import asyncio
import time

import pytest

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.connection import CONNECTION_WINDOW, Http2Connection
from offload_builder.buildkit.h2.limits import Allowance, Budget, ConnectionLimits, FloodGuard
from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.h2.stream import ConnectionLostError

SMALL = ConnectionLimits(
    receive_window=1 << 20, max_streams=4, max_unread=2 << 20, max_headers=2000, policed=True
)


class Peer:
    """A server connection whose client is the test."""

    def __init__(self, limits=SMALL):
        self.streams = []
        self.connection = Http2Connection(
            self._sink, client=False, on_stream=self.streams.append, limits=limits
        )
        self.reader = frames.FrameReader()
        self.sent = []

    async def _sink(self, pieces):
        self.sent += self.reader.feed(b"".join(pieces))

    async def __aenter__(self):
        self.connection.start()
        self.connection.feed(frames.PREFACE + frames.settings_frame({}))
        await self.settle()
        self.sent.clear()
        return self

    async def __aexit__(self, *_):
        await self.connection.close()

    async def settle(self):
        for _ in range(20):
            await asyncio.sleep(0)

    def open(self, stream_id=1, flags=frames.END_HEADERS):
        self.connection.feed(frames.frame(frames.HEADERS, flags, stream_id, b"\x83"))

    def codes(self):
        """Error codes of the GOAWAY frames."""
        return [frames.parse_u32(i[3], 4) for i in self.sent if i[0] == frames.GOAWAY]


def test_an_allowance_refills_up_to_its_burst():
    now = [0.0]
    allowance = Allowance(10, 3, lambda: now[0])
    assert [allowance.spend() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.1
    assert [allowance.spend() for _ in range(2)] == [True, False]
    now[0] = 100
    assert sum(allowance.spend() for _ in range(9)) == 3


@pytest.mark.parametrize(
    ("kind", "flags", "size", "honest"),
    [
        (frames.SETTINGS, 0, 0, 100),
        (frames.RST_STREAM, 0, 4, 300),
        (frames.DATA, 0, 0, 100),
        (frames.HEADERS, 4, 1, 1000),
        (frames.PING, 0, 8, 10_000),
        (0x2, 0, 5, 100),
    ],
)
def test_many_frames_that_cost_nothing_end_the_connection(kind, flags, size, honest):
    guard = FloodGuard(lambda: 0.0)
    for _ in range(honest):
        guard.see(kind, flags, size)
    with pytest.raises(frames.ProtocolError) as caught:
        for _ in range(30_000):
            guard.see(kind, flags, size)
    assert caught.value.code == frames.ENHANCE_YOUR_CALM


def test_data_windows_and_answers_to_our_pings_are_free():
    guard = FloodGuard(lambda: 0.0)
    for _ in range(100_000):
        guard.see(frames.DATA, 0, 1)
        guard.see(frames.WINDOW_UPDATE, 0, 4)
        guard.see(frames.PING, frames.ACK, 8)


async def test_a_flood_of_resets_ends_the_connection_with_its_code():
    async with Peer() as peer:
        for number in range(3000):
            peer.open(2 * number + 1)
            peer.connection.feed(frames.reset_frame(2 * number + 1, frames.CANCEL))
        await peer.settle()
        assert peer.codes() == [frames.ENHANCE_YOUR_CALM]
        assert peer.connection.ended.is_set()


async def test_streams_above_the_limit_are_refused():
    async with Peer() as peer:
        for number in range(5):
            peer.open(2 * number + 1)
        await peer.settle()
        resets = [(i[2], frames.parse_u32(i[3])) for i in peer.sent if i[0] == frames.RST_STREAM]
        assert resets == [(9, frames.REFUSED_STREAM)]


async def test_a_header_block_above_the_limit_ends_the_connection():
    async with Peer() as peer:
        block = b"\x00\x01a" + b"\x7f\x80\x0f" + b"x" * 2047
        peer.connection.feed(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, block))
        await peer.settle()
        assert peer.codes()


async def test_unread_bytes_get_the_peer_no_more_room():
    limits = ConnectionLimits(receive_window=8 << 20, max_unread=2 << 20)
    async with Peer(limits) as peer:
        peer.open()
        for _ in range(6 << 6):
            peer.connection.feed(frames.frame(frames.DATA, 0, 1, b"x" * 16_384))
        await peer.settle()
        assert not any(i[0] == frames.WINDOW_UPDATE and i[2] == 0 for i in peer.sent)
        assert len(await peer.streams[0].read()) == 6 << 20
        await peer.settle()
        credit = sum(
            frames.parse_u32(i[3]) for i in peer.sent if i[0] == frames.WINDOW_UPDATE and i[2] == 0
        )
        assert credit >= CONNECTION_WINDOW // 4


async def test_bytes_of_a_stream_that_ended_are_not_counted_for_ever():
    limits = ConnectionLimits(receive_window=1 << 20, max_unread=0)
    async with Peer(limits) as peer:
        for number in range(40):
            stream_id = 2 * number + 1
            peer.open(stream_id)
            for _ in range(20):
                peer.connection.feed(frames.frame(frames.DATA, 0, stream_id, b"x" * 16_384))
            peer.connection.feed(frames.reset_frame(stream_id, frames.CANCEL))
        await peer.settle()
        assert any(i[0] == frames.WINDOW_UPDATE and i[2] == 0 for i in peer.sent)


async def test_a_connection_that_goes_away_takes_no_new_streams_and_ends_the_open_one():
    async with Peer() as peer:
        peer.open(1)
        peer.connection.go_away()
        peer.open(3)
        await peer.settle()
        assert peer.codes() == [frames.NO_ERROR]
        assert [i[2] for i in peer.sent if i[0] == frames.RST_STREAM] == [3]
        peer.streams[0].send_headers([(":status", "200")])
        peer.streams[0].end([("grpc-status", "0")])
        await peer.settle()
        assert any(i[0] == frames.HEADERS and i[2] == 1 for i in peer.sent)


async def test_a_ping_waits_for_its_own_answer():
    async with Peer() as peer:
        waiting = asyncio.ensure_future(peer.connection.ping())
        await peer.settle()
        (ping,) = [i for i in peer.sent if i[0] == frames.PING]
        peer.connection.feed(frames.frame(frames.PING, frames.ACK, 0, b"\0" * 8))
        await peer.settle()
        assert not waiting.done()
        peer.connection.feed(frames.frame(frames.PING, frames.ACK, 0, ping[3]))
        await asyncio.wait_for(waiting, 1)


async def test_a_ping_ends_with_the_connection():
    async with Peer() as peer:
        waiting = asyncio.ensure_future(peer.connection.ping())
        await peer.settle()
        peer.connection.lose("gone")
        with pytest.raises(ConnectionLostError):
            await waiting
        with pytest.raises(ConnectionLostError):
            await peer.connection.ping()


async def test_open_streams_hold_a_bounded_size_of_headers():
    limits = ConnectionLimits(max_headers=1 << 20, max_held_headers=3000, policed=True)
    async with Peer(limits) as peer:
        # One new entry of the table of 1000 bytes, and then what stands for it in a byte.
        name, value = b"a" * 10, b"b" * 990
        entry = b"\x40\x0a" + name + b"\x7f" + bytes([0xDF, 0x06]) + value + b"\x83"
        peer.connection.feed(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, entry))
        for stream_id in (3, 5, 7, 9):
            block = frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, b"\xbe\x83")
            peer.connection.feed(block)
        await peer.settle()
        assert [stream.id for stream in peer.streams] == [1, 3]
        assert [item[2] for item in peer.sent if item[0] == frames.RST_STREAM] == [5, 7, 9]
        peer.streams[0].reset()
        again = frames.frame(frames.HEADERS, frames.END_HEADERS, 11, b"\xbe\x83")
        peer.connection.feed(again)
        assert [stream.id for stream in peer.streams] == [1, 3, 11]


async def test_what_follows_the_request_of_a_client_is_not_kept():
    async with Peer() as peer:
        peer.open()
        late = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, b"\x83")
        peer.connection.feed(late)
        assert peer.streams[0].remote_ended
        assert peer.streams[0].trailers == []


async def test_a_frame_full_of_settings_costs_no_more_than_one_change():
    limits = ConnectionLimits(max_streams=256, policed=True)
    async with Peer(limits) as peer:
        for number in range(256):
            peer.open(2 * number + 1)
        pair = b"\x00\x04\x00\x00\x00\x01\x00\x04\x00\x00\xff\xff"
        began = time.process_time()
        for _ in range(20):
            peer.connection.feed(frames.frame(frames.SETTINGS, 0, 0, pair * 1365))
        assert time.process_time() - began < 0.5
        assert not peer.codes()
        assert peer.streams[0].send_window == frames.DEFAULT_WINDOW


def test_a_budget_is_part_of_a_larger_one():
    whole = Budget(10)
    one, other = Budget(8, whole), Budget(8, whole)
    one.take(6)
    with pytest.raises(GrpcError):
        one.take(3)
    with pytest.raises(GrpcError):
        other.take(5)
    one.give(6)
    other.take(5)
    assert (one.held, other.held, whole.held) == (0, 5, 5)
