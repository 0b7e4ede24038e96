"""One HTTP/2 connection, client or server, over any pipe for bytes.

The owner hands in what it receives with `feed` and provides `sink`, which is awaited with what is
to be sent, in pieces that are not joined yet.

Source: RFC 9113. Not offered, because gRPC uses neither: server push, priorities.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.frames import FrameReader, ProtocolError
from offload_builder.buildkit.h2.headers import HeaderDecoder, HeaderList, list_size
from offload_builder.buildkit.h2.limits import TRUSTED, ConnectionLimits, FloodGuard
from offload_builder.buildkit.h2.outbox import Outbox
from offload_builder.buildkit.h2.stream import (
    ConnectionLostError,
    Http2Stream,
    StreamResetError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from offload_builder.buildkit.h2.frames import Buffer, Frame

CONNECTION_WINDOW = 16 * 2**20
"""Bytes of all streams on their way to us. Given back when they arrive, not when they are read,
so that a stream nobody reads cannot hold up a health check; memory is bounded by
`ConnectionLimits`."""
_EXPECTED = {
    frames.WINDOW_UPDATE: (4, None),
    frames.PING: (8, False),
    frames.SETTINGS: (-1, False),
    frames.RST_STREAM: (4, True),
    frames.GOAWAY: (-1, False),
}
"""By type: bytes of the payload, -1 for any; whether it belongs to a stream, None for both."""


class Http2Connection:
    """A connection; use `start`, `feed`, and `close` or `lose`. `ended` is set when it is over."""

    def __init__(
        self,
        sink: Callable[[list[Buffer]], Awaitable[None]],
        *,
        client: bool,
        on_stream: Callable[[Http2Stream], None] | None = None,
        limits: ConnectionLimits = TRUSTED,
        greeted: bool = False,
    ) -> None:
        """Set what is sent to and who hears of new streams.

        Args:
            sink: takes what is to be sent.
            client: our side of the connection.
            on_stream: hears of each stream of the peer.
            limits: for the peer.
            greeted: somebody has sent the client's preface and first SETTINGS already.
        """
        self._greeted = greeted
        self._client = client
        self._limits = limits
        self._guard = FloodGuard() if limits.policed else None
        self._on_stream = on_stream
        self._out = Outbox(sink, on_lost=self.lose, on_end=self._local_end)
        self._reader = FrameReader()
        self._preface_left = b"" if client else frames.PREFACE
        self._decoder = HeaderDecoder(limits.max_headers)
        self._streams: dict[int, Http2Stream] = {}
        self._next_id = 1
        self._last_peer_id = 0
        self._peer_streams_limit = 2**31 - 1
        self._peer_initial_window = frames.DEFAULT_WINDOW
        self._uncredited = 0
        self._unread = 0
        self._held_headers = 0
        self._refusing = False
        self._pings: dict[bytes, asyncio.Future[None]] = {}
        self._going_away = ""
        self._lost: ConnectionLostError | None = None
        self.ended = asyncio.Event()

    # Life cycle.

    def start(self) -> None:
        """Send our settings and begin to serve the queues."""
        settings = {
            frames.SETTINGS_INITIAL_WINDOW_SIZE: self._limits.receive_window,
            frames.SETTINGS_MAX_HEADER_LIST_SIZE: self._limits.max_headers,
        }
        if self._client:
            settings[frames.SETTINGS_ENABLE_PUSH] = 0
            if not self._greeted:
                self._out.control(frames.PREFACE)
        else:
            settings[frames.SETTINGS_MAX_CONCURRENT_STREAMS] = self._limits.max_streams
        self._out.control(frames.settings_frame(settings))
        increment = CONNECTION_WINDOW - frames.DEFAULT_WINDOW
        self._out.control(frames.window_update_frame(0, increment))
        self._out.start()

    async def close(self, timeout: float = 1.0) -> None:
        """Say goodbye, send what is queued if that takes less than `timeout` seconds, and end."""
        self._out.control(frames.goaway_frame(self._last_peer_id, frames.NO_ERROR))
        await self._out.close(timeout)
        self.lose("the connection was closed")

    def lose(self, reason: str) -> None:
        """The pipe is gone: end all streams."""
        if self._lost is None:
            self._lost = ConnectionLostError(self._going_away or reason)
            self._out.drop_all()
            self._fail_all(self._lost)

    def _fail_all(self, error: ConnectionLostError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        for answer in self._pings.values():
            if not answer.done():
                answer.set_exception(error)
        self.ended.set()

    def go_away(self) -> None:
        """Take no new streams, as a server; those that are open end in their own time.

        A gRPC client opens another connection for its next calls.
        """
        if not self._refusing and self.usable:
            self._refusing = True
            self._out.control(frames.goaway_frame(self._last_peer_id, frames.NO_ERROR))

    async def ping(self) -> None:
        """Wait for a sign of life of the peer; bound it with a timeout.

        Raises:
            ConnectionLostError: the connection is gone.
        """
        if self._lost is not None:
            raise self._lost
        number = os.urandom(8)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings[number] = answer
        self._out.control(frames.frame(frames.PING, 0, 0, number))
        try:
            await answer
        finally:
            self._pings.pop(number, None)

    @property
    def open_streams(self) -> int:
        """How many streams have not ended."""
        return len(self._streams)

    @property
    def lost(self) -> ConnectionLostError | None:
        """Why the connection is gone, or None."""
        return self._lost

    @property
    def usable(self) -> bool:
        """Whether new streams can be opened."""
        return self._lost is None and not self._going_away

    @property
    def drained(self) -> bool:
        """Whether the peer is closing the connection and waits for nothing more of ours."""
        return bool(self._going_away) and not self._streams

    def open_stream(self, headers: HeaderList) -> Http2Stream:
        """Begin a stream, as a client.

        Raises:
            ConnectionLostError: the connection is gone or going.
            StreamResetError: the peer does not take so many streams.
        """
        if not self.usable:
            raise self._lost or ConnectionLostError(self._going_away)
        if len(self._streams) >= self._peer_streams_limit:
            raise StreamResetError(frames.REFUSED_STREAM, "too many calls on one connection")
        stream = self._new_stream(self._next_id)
        self._next_id += 2
        self._streams[stream.id] = stream
        stream.send_headers(headers)
        return stream

    # Called by streams.

    def send_control(self, data: bytes) -> None:
        """Queue frames that are not subject to flow control."""
        self._out.control(data)

    def send_headers(self, stream_id: int, headers: HeaderList) -> None:
        """Queue a header block."""
        self._out.headers(stream_id, headers)

    def wants_to_send(self, stream: Http2Stream) -> None:
        """Note that a stream has data or its end to send."""
        self._out.data(stream)

    def forget(self, stream: Http2Stream) -> None:
        """Drop a stream that has ended; late frames for it are ignored."""
        if self._streams.pop(stream.id, None) is not None:
            self.note_read(stream.drop_unread())
            self._held_headers -= stream.held_headers
        self._out.drop(stream)

    def _local_end(self, stream: Http2Stream) -> None:
        if stream.closed:
            self.forget(stream)
        elif not self._client:
            # The answer is complete; RFC 9113 8.1: ask the client to stop sending.
            self._out.control(frames.reset_frame(stream.id, frames.NO_ERROR))
            self.forget(stream)

    # Receiving.

    def room(self) -> memoryview:
        """Return where received bytes can be written; see `filled`."""
        return self._reader.room()

    def filled(self, size: int) -> None:
        """Do as `feed` with `size` bytes in `room`, without a copy of all of them."""
        if self.ended.is_set():
            return
        if self._preface_left:
            try:
                data = self._check_preface(bytes(self._reader.room()[:size]))
            except ProtocolError as error:
                self._break_off(error)
                return
            size = len(data)
            self._reader.room()[:size] = data
        self._take_frames(self._reader.filled(size))

    def feed(self, data: bytes) -> None:
        """Take received bytes; a peer that breaks the protocol ends the connection."""
        if self.ended.is_set():
            return
        try:
            if self._preface_left:
                data = self._check_preface(data)
        except ProtocolError as error:
            self._break_off(error)
            return
        self._take_frames(self._reader.feed(data))

    def _take_frames(self, found: Iterable[Frame]) -> None:
        try:
            for kind, flags, stream_id, payload in found:
                if kind == frames.RUN:
                    self._take_run(flags, stream_id, payload)
                    continue
                if self._guard is not None:
                    self._guard.see(kind, flags, len(payload))
                if kind == frames.DATA and not self._decoder.pending:
                    self._take_data(flags, stream_id, payload)
                else:
                    self._take_frame(kind, flags, stream_id, payload)
        except ProtocolError as error:
            self._break_off(error)

    def _break_off(self, error: ProtocolError) -> None:
        self._out.control(frames.goaway_frame(self._last_peer_id, error.code, str(error)))
        self._out.finish()
        self._going_away = f"HTTP/2 error: {error}"
        self._fail_all(ConnectionLostError(self._going_away))

    def join(self, stream_id: int, other: int) -> None:
        """Give the DATA of a stream to it in runs with another stream's number; 0 ends that."""
        if other:
            self._reader.joined[stream_id] = other
        else:
            self._reader.joined.pop(stream_id, None)

    def _take_run(self, count: int, stream_id: int, run: bytes) -> None:
        if self._decoder.pending:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a header block was interrupted")
        size = len(run) - count * frames.HEADER_SIZE
        self._uncredited += size
        stream = self._streams.get(stream_id)
        if stream is None:
            self._credit()
            return
        self._unread += size
        self._credit()
        if stream.remote_ended:
            self._reset(stream, frames.STREAM_CLOSED, "data after the end of the stream")
        elif not stream.take_run(run, size):
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "the peer ignored our window")

    def _check_preface(self, data: bytes) -> bytes:
        size = min(len(data), len(self._preface_left))
        if data[:size] != self._preface_left[:size]:
            raise ProtocolError(frames.PROTOCOL_ERROR, "the peer does not speak HTTP/2")
        self._preface_left = self._preface_left[size:]
        return data[size:]

    def _take_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._uncredited += size
        stream = self._streams.get(stream_id)
        if stream is None:
            self._credit()
            self._check_not_idle(stream_id)
            return
        self._unread += size
        self._credit()
        if flags & frames.PADDED:
            payload = frames.strip_padding(frames.PADDED, payload)
        if stream.remote_ended:
            self._reset(stream, frames.STREAM_CLOSED, "data after the end of the stream")
        elif not stream.take_data(payload, size):
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "the peer ignored our window")
        elif flags & frames.END_STREAM:
            self._remote_end(stream)

    def note_read(self, size: int) -> None:
        """Hear that bytes of a stream need no memory any more."""
        self._unread -= size
        self._credit()

    def _credit(self) -> None:
        """Give the peer room again, unless too much lies unread already."""
        if self._uncredited >= CONNECTION_WINDOW // 4 and self._unread <= self._limits.max_unread:
            self._out.control(frames.window_update_frame(0, self._uncredited))
            self._uncredited = 0

    def _take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.CONTINUATION:
            self._take_block(self._decoder.go_on(flags, stream_id, payload))
        elif self._decoder.pending:
            raise ProtocolError(frames.PROTOCOL_ERROR, "a header block was interrupted")
        elif kind == frames.HEADERS:
            self._take_block(self._decoder.begin(flags, stream_id, payload))
        elif kind in _EXPECTED:
            size, on_stream = _EXPECTED[kind]
            if size >= 0 and len(payload) != size:
                raise ProtocolError(frames.FRAME_SIZE_ERROR, "frame of a wrong size")
            if on_stream is not None and on_stream != bool(stream_id):
                raise ProtocolError(frames.PROTOCOL_ERROR, "frame on a wrong stream")
            self._take_small(kind, flags, stream_id, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ProtocolError(frames.PROTOCOL_ERROR, "server push is off")

    def _take_small(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE:
            self._take_window_update(stream_id, frames.parse_u32(payload))
        elif kind == frames.PING:
            if not flags & frames.ACK:
                self._out.control(frames.frame(frames.PING, frames.ACK, 0, payload))
            elif (answer := self._pings.get(payload)) is not None and not answer.done():
                answer.set_result(None)
        elif kind == frames.SETTINGS:
            if not flags & frames.ACK:
                self._take_settings(payload)
        elif kind == frames.RST_STREAM:
            self._take_reset(stream_id, frames.parse_u32(payload))
        else:
            self._take_goaway(payload)

    def _take_block(self, block: tuple[int, HeaderList, bool] | None) -> None:
        if block is None:
            return
        stream_id, headers, end_stream = block
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._client or 0 < stream_id <= self._last_peer_id:
                self._check_not_idle(stream_id)
                return
            stream = self._accept(stream_id, list_size(headers))
            if stream is not None:
                stream.take_headers(headers, end_stream=end_stream)
                if self._on_stream is not None:
                    self._on_stream(stream)
            return
        if stream.remote_ended:
            self._reset(stream, frames.STREAM_CLOSED, "headers after the end of the stream")
            return
        # Nobody reads what a client says after its request.
        stream.take_headers(headers if self._client else [])
        if end_stream:
            self._remote_end(stream)

    def _accept(self, stream_id: int, header_size: int) -> Http2Stream | None:
        if stream_id % 2 == 0:
            raise ProtocolError(frames.PROTOCOL_ERROR, "wrong stream identifier")
        self._last_peer_id = stream_id
        held = self._held_headers + header_size
        limits = self._limits
        full = len(self._streams) >= limits.max_streams or held > limits.max_held_headers
        if full or not self.usable or self._refusing:
            self._out.control(frames.reset_frame(stream_id, frames.REFUSED_STREAM))
            return None
        stream = self._new_stream(stream_id)
        stream.held_headers, self._held_headers = header_size, held
        self._streams[stream_id] = stream
        return stream

    def _new_stream(self, stream_id: int) -> Http2Stream:
        window, ours = self._peer_initial_window, self._limits.receive_window
        return Http2Stream(self, stream_id, window, ours)

    def _check_not_idle(self, stream_id: int) -> None:
        newest = self._next_id - 2 if self._client else self._last_peer_id
        if stream_id == 0 or stream_id > newest:
            raise ProtocolError(frames.PROTOCOL_ERROR, f"frame for idle stream {stream_id}")

    def _remote_end(self, stream: Http2Stream) -> None:
        stream.take_end()
        if stream.closed:
            self.forget(stream)

    def _reset(self, stream: Http2Stream, code: int, message: str) -> None:
        self._out.control(frames.reset_frame(stream.id, code))
        stream.fail(StreamResetError(code, message))
        self.forget(stream)

    def _take_reset(self, stream_id: int, code: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id)
            return
        stream.fail(StreamResetError(code, f"the peer reset the stream (HTTP/2 error {code})"))
        self.forget(stream)

    def _take_window_update(self, stream_id: int, increment: int) -> None:
        if stream_id == 0:
            self._out.widen(increment)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id)
        elif increment == 0 or stream.send_window + increment > frames.MAX_WINDOW:
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "wrong WINDOW_UPDATE")
        else:
            self._widen(stream, increment)

    def _widen(self, stream: Http2Stream, increment: int) -> None:
        stream.send_window += increment
        if stream.pending_size:
            self._out.data(stream)

    def _take_settings(self, payload: bytes) -> None:
        window = self._peer_initial_window
        for key, value in frames.parse_settings(payload):
            if key == frames.SETTINGS_INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ProtocolError(frames.FLOW_CONTROL_ERROR, "window is too large")
                window = value
            elif key == frames.SETTINGS_MAX_FRAME_SIZE:
                self._out.set_max_frame(value)
            elif key == frames.SETTINGS_HEADER_TABLE_SIZE:
                self._out.set_table_size(value)
            elif key == frames.SETTINGS_MAX_CONCURRENT_STREAMS:
                self._peer_streams_limit = value
        # Once: it concerns all streams, and a frame has room for thousands of changes.
        self._move_windows(window - self._peer_initial_window)
        self._out.control(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _move_windows(self, change: int) -> None:
        self._peer_initial_window += change
        for stream in self._streams.values() if change else ():
            if stream.send_window + change > frames.MAX_WINDOW:
                raise ProtocolError(frames.FLOW_CONTROL_ERROR, "window is too large")
            self._widen(stream, change)

    def _take_goaway(self, payload: bytes) -> None:
        last = frames.parse_u32(payload)
        text = payload[8:].decode("utf-8", "replace")
        self._going_away = "the peer is closing the connection" + (f": {text}" if text else "")
        for stream in list(self._streams.values()):
            if self._client and stream.id > last:
                stream.fail(ConnectionLostError(self._going_away))
                self.forget(stream)
