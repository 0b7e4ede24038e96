"""DATA frames that go from one connection to another together."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.frames import FrameReader
from offload_builder.buildkit.h2.headers import HeaderEncoder
from offload_builder.buildkit.h2.limits import ConnectionLimits
from offload_builder.buildkit.h2.runs import Run
from offload_builder.buildkit.h2.stream import StreamResetError

HEADERS = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "x")]


def data_frame(payload, stream_id=1, flags=0):
    return frames.frame(frames.DATA, flags, stream_id, payload)


def payloads(data):
    found = list(FrameReader().feed(bytes(data)))
    assert sum(frames.HEADER_SIZE + len(item[3]) for item in found) == len(data)
    return [item[3] for item in found]


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=20), limits=st.data())
def test_a_run_is_cut_at_any_place(sizes, limits):
    chance = random.Random(len(sizes))
    whole = [chance.randbytes(size) for size in sizes]
    left = [Run(b"".join(map(data_frame, whole)), sum(sizes))]
    got = b""
    while left:
        piece = left.pop(0)
        if not isinstance(piece, Run):
            got += piece
            continue
        limit = limits.draw(st.integers(1, piece.size))
        front, rest = piece.cut(limit)
        assert front.size <= limit
        assert sum(map(len, payloads(front.data))) == front.size
        assert front.size + sum(getattr(i, "size", 0) or len(i) for i in rest) == piece.size
        assert front.size == limit or not isinstance(rest[0], Run)
        got += b"".join(payloads(front.data))
        left = rest + left
    assert got == b"".join(whole)


frames_of_two = st.lists(
    st.tuples(
        st.sampled_from([1, 1, 1, 3]), st.sampled_from([0, 0, 0, 1]), st.binary(max_size=300)
    ),
    max_size=30,
)


@given(sent=frames_of_two, cuts=st.lists(st.integers(1, 2000), max_size=10), own=st.booleans())
def test_runs_and_other_frames_come_in_their_order(sent, cuts, own):
    data = b"".join(data_frame(payload, number, flags) for number, flags, payload in sent)
    reader, found, position = FrameReader(), [], 0
    reader.joined[1] = 9
    for size in [*cuts, len(data) + 1]:
        piece = data[position : position + size]
        position += len(piece)
        if own:
            reader.room()[: len(piece)] = piece
            news = list(reader.filled(len(piece)))
        else:
            news = list(reader.feed(piece))
        for kind, flags, number, payload in news:
            if kind == frames.RUN:
                inside = list(FrameReader().feed(payload))
                assert len(inside) == flags
                assert all(item[:3] == (frames.DATA, 0, 9) for item in inside)
                found += [(number, 0, item[3]) for item in inside]
            else:
                assert number == 3 or flags or not payload
                found.append((number, flags, payload))
    assert found == sent


def test_a_frame_that_is_too_large_is_refused_after_a_run():
    reader = FrameReader(max_frame=100)
    reader.joined[1] = 1
    with pytest.raises(frames.ProtocolError):
        list(reader.feed(data_frame(b"x" * 100) + frames.frame_header(101, frames.DATA, 0, 1)))


class Raw:
    """A connection of ours whose peer is the test, and what it sends."""

    def __init__(self, *, client, window=1 << 20):
        self.sent, self.accepted = [], asyncio.Queue()
        self._reader = FrameReader()
        limits = ConnectionLimits(receive_window=window)
        self.connection = Http2Connection(
            self._sink, client=client, on_stream=self.accepted.put_nowait, limits=limits
        )

    async def _sink(self, pieces):
        self.sent += self._reader.feed(b"".join(pieces).removeprefix(frames.PREFACE))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.connection.close()

    def data(self):
        return b"".join(item[3] for item in self.sent if item[0] == frames.DATA)

    async def until(self, ready):
        async with asyncio.timeout(5):
            while not ready():
                await asyncio.sleep(0.001)


def arrived(end, size):
    return len(end.data()) == size


async def pair(window=1 << 20):
    source, target = Raw(client=False, window=window), Raw(client=True)
    source.connection.start()
    target.connection.start()
    block = HeaderEncoder().encode(1, HEADERS, end_stream=False)
    source.connection.feed(frames.PREFACE + frames.settings_frame({}) + block)
    target.connection.open_stream(HEADERS)
    out = target.connection.open_stream(HEADERS)
    return source, target, await source.accepted.get(), out


async def test_frames_keep_their_limits_and_get_the_number_of_the_other_stream():
    source, target, stream, out = await pair()
    async with source, target:
        task = asyncio.ensure_future(stream.pass_on(out))
        await asyncio.sleep(0)
        source.connection.feed(data_frame(b"one") + data_frame(b"two") + data_frame(b"", flags=1))
        await asyncio.wait_for(task, 5)
        await target.until(lambda: target.data() == b"onetwo")
        got = [item for item in target.sent if item[0] == frames.DATA]
        assert [item[2:] for item in got] == [(out.id, b"one"), (out.id, b"two")]


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 3000), max_size=30), size=st.integers(1, 200))
def test_no_byte_leaves_beyond_the_window_of_the_other_side(widths, size):
    async def run():
        source, target, stream, out = await pair()
        async with source, target:
            settings_frame = frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 0})
            target.connection.feed(settings_frame)
            task = asyncio.ensure_future(stream.pass_on(out))
            await asyncio.sleep(0)
            chance = random.Random(size)
            whole = [chance.randbytes(size) for _ in range(100)]
            source.connection.feed(b"".join(map(data_frame, whole)) + data_frame(b"", flags=1))
            await asyncio.wait_for(task, 5)
            total, room = size * 100, 0
            for width in [*widths, total]:
                room += width
                target.connection.feed(frames.window_update_frame(out.id, width))
                await target.until(partial(arrived, target, min(room, total)))
            assert target.data() == b"".join(whole)

    asyncio.run(run())


async def test_a_peer_gets_no_more_room_while_the_other_side_takes_nothing():
    source, target, stream, out = await pair(window=4 << 20)
    async with source, target:
        target.connection.feed(frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 0}))
        task = asyncio.ensure_future(stream.pass_on(out))
        await asyncio.sleep(0)
        for _ in range((4 << 20) // 16_384):
            source.connection.feed(data_frame(b"x" * 16_384))
        await asyncio.sleep(0.01)
        grants = [item for item in source.sent if item[0] == frames.WINDOW_UPDATE and item[2] == 1]
        assert grants == []
        # One byte more, and it has ignored our window.
        source.connection.feed(data_frame(b"x"))
        with pytest.raises(StreamResetError):
            await asyncio.wait_for(task, 5)
        assert stream.failed is not None


async def test_room_is_given_when_the_other_side_takes_bytes_again():
    source, target, stream, out = await pair(window=4 << 20)
    async with source, target:
        target.connection.feed(frames.settings_frame({frames.SETTINGS_INITIAL_WINDOW_SIZE: 0}))
        task = asyncio.ensure_future(stream.pass_on(out))
        await asyncio.sleep(0)
        for _ in range((4 << 20) // 16_384):
            source.connection.feed(data_frame(b"x" * 16_384))
        target.connection.feed(frames.window_update_frame(0, 8 << 20))
        target.connection.feed(frames.window_update_frame(out.id, 4 << 20))
        await source.until(
            lambda: any(i[0] == frames.WINDOW_UPDATE and i[2] == 1 for i in source.sent)
        )
        await target.until(lambda: len(target.data()) == 4 << 20)
        assert source.connection._unread == 0
        task.cancel()
        await asyncio.wait((task,))


async def test_data_after_the_end_of_a_stream_is_not_passed_on():
    source, target, stream, out = await pair()
    async with source, target:
        task = asyncio.ensure_future(stream.pass_on(out))
        await asyncio.sleep(0)
        source.connection.feed(data_frame(b"all", flags=1) + data_frame(b"more"))
        await asyncio.wait((task,))
        await target.until(lambda: target.data() == b"all")
        await asyncio.sleep(0.01)
        assert target.data() == b"all"
        assert any(item[0] == frames.RST_STREAM for item in source.sent)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_reset_of_either_side_ends_it(side):
    source, target, stream, out = await pair()
    async with source, target:
        task = asyncio.ensure_future(stream.pass_on(out))
        await asyncio.sleep(0)
        source.connection.feed(data_frame(b"one"))
        broken, number = (source, 1) if side == "source" else (target, out.id)
        broken.connection.feed(frames.reset_frame(number, frames.CANCEL))
        with pytest.raises(StreamResetError):
            await asyncio.wait_for(task, 5)
        # Late frames do no harm.
        source.connection.feed(data_frame(b"two"))
        assert source.connection.lost is None
