from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Self

import pytest

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.connection import CONNECTION_WINDOW, Http2Connection
from offload_builder.buildkit.h2.headers import HeaderDecoder
from offload_builder.buildkit.h2.stream import (
    RECEIVE_WINDOW,
    SEND_HIGH_WATER,
    ConnectionLostError,
    StreamResetError,
)

REQUEST = [(":method", "POST"), (":path", "/x")]


class Pair:
    """A client and a server, joined by pipes that cut their bytes at random places."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.accepted: asyncio.Queue = asyncio.Queue()
        self.client = Http2Connection(self._to_server, client=True)
        self.server = Http2Connection(
            self._to_client, client=False, on_stream=self.accepted.put_nowait
        )

    async def _to_server(self, pieces: list) -> None:
        await self._deliver(self.server, b"".join(pieces))

    async def _to_client(self, pieces: list) -> None:
        await self._deliver(self.client, b"".join(pieces))

    async def _deliver(self, target: Http2Connection, data: bytes) -> None:
        position = 0
        while position < len(data):
            size = self.random.choice((1, 5, 9, 100, 20_000, 1 << 20))
            target.feed(data[position : position + size])
            position += size
        await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        self.client.start()
        self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.close()

    async def stream(self):
        ours = self.client.open_stream(REQUEST)
        return ours, await asyncio.wait_for(self.accepted.get(), 5)


async def read_all(stream) -> bytes:
    parts = []
    while data := await stream.read():
        parts.append(data)
    return b"".join(parts)


class Recorder:
    """A connection whose peer is the test: what it sends is recorded frame by frame."""

    def __init__(self, *, client: bool = False) -> None:
        self.streams: list = []
        self.connection = Http2Connection(self._sink, client=client, on_stream=self.streams.append)
        self.reader = frames.FrameReader()
        self.sent: list[frames.Frame] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def _sink(self, pieces: list) -> None:
        await self.hold.wait()
        self.sent += self.reader.feed(b"".join(pieces).removeprefix(frames.PREFACE))

    async def __aenter__(self) -> Self:
        self.connection.start()
        if not self.connection._client:
            self.connection.feed(frames.PREFACE + frames.settings_frame({}))
        await self.settle()
        self.sent.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hold.set()
        await self.connection.close()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def kinds(self) -> list[int]:
        return [item[0] for item in self.sent]

    def data(self, stream_id: int) -> bytes:
        return b"".join(i[3] for i in self.sent if i[0] == frames.DATA and i[2] == stream_id)

    def open(self, stream_id: int = 1, flags: int = frames.END_HEADERS) -> None:
        self.connection.feed(frames.frame(frames.HEADERS, flags, stream_id, b"\x83"))


@pytest.mark.parametrize("seed", range(5))
async def test_bytes_arrive_whole_both_ways_through_any_cutting(seed):
    async with Pair(seed) as pair:
        ours, theirs = await pair.stream()
        assert theirs.headers == REQUEST
        up, down = random.randbytes(3_000_000), random.randbytes(2_500_000)

        async def echo() -> bytes:
            theirs.send_headers([(":status", "200")])
            got = await read_all(theirs)
            await theirs.write([down])
            theirs.end([("grpc-status", "0")])
            return got

        async def ask() -> bytes:
            for start in range(0, len(up), 7_777):
                await ours.write([up[start : start + 7_777]])
            ours.end()
            return await read_all(ours)

        async with asyncio.timeout(20):
            got_up, got_down = await asyncio.gather(echo(), ask())
        assert got_up == up
        assert got_down == down
        assert ours.trailers == [("grpc-status", "0")]


async def test_header_lists_of_many_frames_arrive():
    async with Pair() as pair:
        headers = [*REQUEST, *(("exclude-patterns", f"dir/file-{n:06}") for n in range(5000))]
        pair.client.open_stream(headers)
        stream = await asyncio.wait_for(pair.accepted.get(), 5)
        assert stream.headers == headers


async def test_a_writer_waits_when_the_reader_does_not_read():
    async with Pair() as pair:
        ours, theirs = await pair.stream()
        total = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                while True:
                    await ours.write([bytes(50_000)])
                    total += 50_000
        assert total <= RECEIVE_WINDOW + SEND_HIGH_WATER + 2 * 50_000
        # Another stream is not held up by it.
        second, other = await pair.stream()
        await second.write([b"hello"])
        assert await asyncio.wait_for(other.read(), 5) == b"hello"
        theirs.reset()


async def test_a_reset_reaches_reader_and_writer_of_the_peer():
    async with Pair() as pair:
        ours, theirs = await pair.stream()
        reading = asyncio.create_task(theirs.read())
        await asyncio.sleep(0.01)
        ours.reset()
        with pytest.raises(StreamResetError):
            await asyncio.wait_for(reading, 5)
        with pytest.raises(StreamResetError):
            await theirs.write([b"x"])


async def test_a_lost_pipe_ends_all_streams():
    async with Pair() as pair:
        ours, _ = await pair.stream()
        pair.client.lose("cable cut")
        with pytest.raises(ConnectionLostError, match="cable cut"):
            await ours.read()
        with pytest.raises(ConnectionLostError):
            pair.client.open_stream(REQUEST)


async def test_ping_is_answered_and_settings_are_acknowledged():
    async with Recorder() as peer:
        peer.connection.feed(frames.frame(frames.PING, 0, 0, b"12345678"))
        peer.connection.feed(frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 10}))
        await peer.settle()
        assert (frames.PING, frames.ACK, 0, b"12345678") in peer.sent
        assert (frames.SETTINGS, frames.ACK, 0, b"") in peer.sent


async def test_the_stream_window_is_kept_also_when_settings_shrink_it():
    async with Recorder() as peer:
        peer.connection.feed(frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 100}))
        peer.open()
        stream = peer.streams[0]
        await stream.write([bytes(250)])
        await peer.settle()
        assert len(peer.data(1)) == 100
        peer.connection.feed(frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 40}))
        peer.connection.feed(frames.window_update_frame(1, 60))  # 0 - 60 + 60
        await peer.settle()
        assert len(peer.data(1)) == 100
        peer.connection.feed(frames.window_update_frame(1, 150))
        await peer.settle()
        assert len(peer.data(1)) == 250


async def test_the_connection_window_is_shared_and_kept():
    async with Recorder() as peer:
        peer.connection.feed(
            frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 1_000_000})
        )
        peer.open(1)
        peer.open(3)
        for stream in peer.streams:
            await stream.write([bytes(60_000)])
            stream.end()
        await peer.settle()
        assert len(peer.data(1)) + len(peer.data(3)) == frames.DEFAULT_WINDOW
        peer.connection.feed(frames.window_update_frame(0, 1_000_000))
        await peer.settle()
        assert (len(peer.data(1)), len(peer.data(3))) == (60_000, 60_000)


async def test_small_writes_leave_in_full_frames():
    async with Recorder() as peer:
        peer.open()
        for _ in range(1000):
            await peer.streams[0].write([b"0123456789"])
        await peer.settle()
        assert peer.kinds().count(frames.DATA) == 1
        assert len(peer.data(1)) == 10_000


async def test_trailers_follow_the_data_and_the_request_is_cut_short():
    async with Recorder() as peer:
        peer.open()
        stream = peer.streams[0]
        stream.send_headers([(":status", "200")])
        await stream.write([b"data"])
        stream.end([("grpc-status", "0")])
        await peer.settle()
        assert peer.kinds() == [
            frames.HEADERS,
            frames.DATA,
            frames.HEADERS,
            frames.RST_STREAM,
        ]
        assert HeaderDecoder().begin(*peer.sent[0][1:]) == (1, [(":status", "200")], False)


async def test_windows_are_given_back():
    async with Recorder() as peer:
        peer.open()
        sent = 0
        while sent < CONNECTION_WINDOW // 2:
            peer.connection.feed(frames.frame(frames.DATA, 0, 1, bytes(16_000)))
            sent += 16_000
            assert await peer.streams[0].read()
        await peer.settle()
        updates = [i for i in peer.sent if i[0] == frames.WINDOW_UPDATE]
        for stream_id, slack in ((0, CONNECTION_WINDOW // 4), (1, RECEIVE_WINDOW // 2)):
            given = sum(frames.parse_u32(i[3]) for i in updates if i[2] == stream_id)
            assert sent - slack <= given <= sent


async def test_a_peer_that_ignores_the_stream_window_loses_the_stream():
    async with Recorder() as peer:
        peer.open()
        for _ in range(RECEIVE_WINDOW // 16_000 + 2):
            peer.connection.feed(frames.frame(frames.DATA, 0, 1, bytes(16_000)))
        await peer.settle()
        assert frames.reset_frame(1, frames.FLOW_CONTROL_ERROR)[9:] in [i[3] for i in peer.sent]
        assert peer.connection.usable


BROKEN = {
    "data on an idle stream": frames.frame(frames.DATA, 0, 5, b"x"),
    "headers on stream 0": frames.frame(frames.HEADERS, frames.END_HEADERS, 0, b"\x83"),
    "even stream": frames.frame(frames.HEADERS, frames.END_HEADERS, 2, b"\x83"),
    "broken hpack": frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff"),
    "interrupted block": frames.frame(frames.HEADERS, 0, 1, b"\x83")
    + frames.frame(frames.PING, 0, 0, bytes(8)),
    "data within a block": frames.frame(frames.HEADERS, 0, 1, b"\x83")
    + frames.frame(frames.DATA, 0, 1, b"x"),
    "lonely continuation": frames.frame(frames.CONTINUATION, 0, 1, b"\x83"),
    "push": frames.frame(frames.PUSH_PROMISE, 0, 1, bytes(4)),
    "window of zero": frames.window_update_frame(0, 0),
    "window too large": frames.window_update_frame(0, 2**31 - 1),
    "settings of a wrong size": frames.frame(frames.SETTINGS, 0, 0, b"12345"),
    "large frame": frames.frame_header(20_000, frames.DATA, 0, 1),
    "ping of a wrong size": frames.frame(frames.PING, 0, 0, b"1234567"),
    "ping on a stream": frames.frame(frames.PING, 0, 1, bytes(8)),
    "reset of the connection": frames.frame(frames.RST_STREAM, 0, 0, bytes(4)),
    "reset of a wrong size": frames.frame(frames.RST_STREAM, 0, 1, bytes(5)),
    "settings on a stream": frames.frame(frames.SETTINGS, 0, 1, b""),
    "goaway on a stream": frames.goaway_frame(0, 0).replace(b"\0\0\0\0", b"\0\0\0\1", 1),
    "empty continuations": frames.frame(frames.HEADERS, 0, 1, b"\x83")
    + frames.frame(frames.CONTINUATION, 0, 1) * 3000,
    "window widened too far by settings": frames.frame(
        frames.HEADERS, frames.END_HEADERS, 1, b"\x83"
    )
    + frames.window_update_frame(1, 2**31 - 1 - 65_535)
    + frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 65_536}),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
async def test_a_broken_peer_gets_goaway_and_nothing_hangs(data):
    async with Recorder() as peer:
        peer.connection.feed(data)
        await peer.settle()
        assert frames.GOAWAY in peer.kinds()
        assert peer.connection.ended.is_set()
        assert not peer.connection.usable
        peer.connection.feed(b"more rubbish")


async def test_headers_after_the_end_reset_the_stream_only():
    async with Recorder() as peer:
        peer.open(1, frames.END_HEADERS | frames.END_STREAM)
        peer.open(1)
        await peer.settle()
        assert frames.reset_frame(1, frames.STREAM_CLOSED)[9:] in [i[3] for i in peer.sent]
        assert peer.connection.usable


async def test_another_protocol_is_refused():
    connection = Http2Connection(lambda _: asyncio.sleep(0), client=False)
    connection.start()
    connection.feed(b"GET / HTTP/1.1\r\n\r\n")
    assert connection.ended.is_set()
    await connection.close()


async def test_frames_for_a_finished_stream_are_ignored():
    async with Recorder() as peer:
        peer.open()
        peer.streams[0].reset()
        peer.connection.feed(frames.frame(frames.DATA, 0, 1, b"late"))
        peer.connection.feed(frames.window_update_frame(1, 5))
        peer.connection.feed(frames.reset_frame(1, frames.CANCEL))
        await peer.settle()
        assert peer.connection.usable


async def test_goaway_fails_the_calls_that_the_peer_will_not_serve():
    async with Recorder(client=True) as peer:
        first = peer.connection.open_stream(REQUEST)
        second = peer.connection.open_stream(REQUEST)
        peer.connection.feed(frames.goaway_frame(first.id, 0, "restart"))
        assert first.failed is None
        with pytest.raises(ConnectionLostError, match="restart"):
            await second.read()
        with pytest.raises(ConnectionLostError):
            peer.connection.open_stream(REQUEST)


async def test_a_peer_that_does_not_read_cannot_fill_the_memory():
    async with Recorder() as peer:
        peer.hold.clear()
        ping = frames.frame(frames.PING, 0, 0, bytes(8)) * 10_000
        for _ in range(60):
            peer.connection.feed(ping)
            await asyncio.sleep(0)
        assert peer.connection.lost is not None


async def test_more_streams_than_allowed_are_refused():
    async with Recorder() as peer:
        for number in range(300):
            peer.open(2 * number + 1)
        await peer.settle()
        assert len(peer.streams) == 256
        assert peer.kinds().count(frames.RST_STREAM) == 44
