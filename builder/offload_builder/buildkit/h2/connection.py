"""One HTTP/2 connection, client or server, over any pipe for bytes.

The owner hands in what it receives with `feed` and provides `sink`, which is awaited with what is
to be sent, in pieces that are not joined yet.

Source: RFC 9113. Not offered, because gRPC uses neither: server push, priorities.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.frames import FrameReader, ProtocolError
from offload_builder.buildkit.h2.headers import MAX_HEADER_LIST, HeaderDecoder, HeaderList
from offload_builder.buildkit.h2.outbox import Outbox
from offload_builder.buildkit.h2.stream import (
    RECEIVE_WINDOW,
    ConnectionLostError,
    Http2Stream,
    StreamResetError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CONNECTION_WINDOW = 16 * 2**20
"""Bytes of all streams on their way to us. Given back when they arrive, not when they are read,
so that a stream nobody reads cannot hold up a health check; memory is bounded by the number of
streams times `RECEIVE_WINDOW`."""
MAX_STREAMS = 256
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
        sink: Callable[[list[bytes | memoryview]], Awaitable[None]],
        *,
        client: bool,
        on_stream: Callable[[Http2Stream], None] | None = None,
    ) -> None:
        self._client = client
        self._on_stream = on_stream
        self._out = Outbox(sink, on_lost=self.lose, on_end=self._local_end)
        self._reader = FrameReader()
        self._preface_left = b"" if client else frames.PREFACE
        self._decoder = HeaderDecoder()
        self._streams: dict[int, Http2Stream] = {}
        self._next_id = 1
        self._last_peer_id = 0
        self._peer_streams_limit = 2**31 - 1
        self._peer_initial_window = frames.DEFAULT_WINDOW
        self._uncredited = 0
        self._going_away = ""
        self._lost: ConnectionLostError | None = None
        self.ended = asyncio.Event()

    # Life cycle.

    def start(self) -> None:
        """Send our settings and begin to serve the queues."""
        settings = {
            frames.SETTINGS_INITIAL_WINDOW_SIZE: RECEIVE_WINDOW,
            frames.SETTINGS_MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
        }
        if self._client:
            settings[frames.SETTINGS_ENABLE_PUSH] = 0
            self._out.control(frames.PREFACE)
        else:
            settings[frames.SETTINGS_MAX_CONCURRENT_STREAMS] = MAX_STREAMS
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
        self.ended.set()

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
        stream = Http2Stream(self, self._next_id, self._peer_initial_window)
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
        self._streams.pop(stream.id, None)
        self._out.drop(stream)

    def _local_end(self, stream: Http2Stream) -> None:
        if stream.closed:
            self.forget(stream)
        elif not self._client:
            # The answer is complete; RFC 9113 8.1: ask the client to stop sending.
            self._out.control(frames.reset_frame(stream.id, frames.NO_ERROR))
            self.forget(stream)

    # Receiving.

    def feed(self, data: bytes) -> None:
        """Take received bytes; a peer that breaks the protocol ends the connection."""
        if self.ended.is_set():
            return
        try:
            if self._preface_left:
                data = self._check_preface(data)
            for kind, flags, stream_id, payload in self._reader.feed(data):
                if kind == frames.DATA and not self._decoder.pending:
                    self._take_data(flags, stream_id, payload)
                else:
                    self._take_frame(kind, flags, stream_id, payload)
        except ProtocolError as error:
            self._out.control(frames.goaway_frame(self._last_peer_id, error.code, str(error)))
            self._out.finish()
            self._going_away = f"HTTP/2 error: {error}"
            self._fail_all(ConnectionLostError(self._going_away))

    def _check_preface(self, data: bytes) -> bytes:
        size = min(len(data), len(self._preface_left))
        if data[:size] != self._preface_left[:size]:
            raise ProtocolError(frames.PROTOCOL_ERROR, "the peer does not speak HTTP/2")
        self._preface_left = self._preface_left[size:]
        return data[size:]

    def _take_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._uncredited += size
        if self._uncredited >= CONNECTION_WINDOW // 4:
            self._out.control(frames.window_update_frame(0, self._uncredited))
            self._uncredited = 0
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id)
            return
        if flags & frames.PADDED:
            payload = frames.strip_padding(frames.PADDED, payload)
        if stream.remote_ended:
            self._reset(stream, frames.STREAM_CLOSED, "data after the end of the stream")
        elif not stream.take_data(payload, size):
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "the peer ignored our window")
        elif flags & frames.END_STREAM:
            self._remote_end(stream)

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
            stream = self._accept(stream_id)
            if stream is not None:
                stream.take_headers(headers, end_stream=end_stream)
                if self._on_stream is not None:
                    self._on_stream(stream)
            return
        if stream.remote_ended:
            self._reset(stream, frames.STREAM_CLOSED, "headers after the end of the stream")
            return
        stream.take_headers(headers)
        if end_stream:
            self._remote_end(stream)

    def _accept(self, stream_id: int) -> Http2Stream | None:
        if stream_id % 2 == 0:
            raise ProtocolError(frames.PROTOCOL_ERROR, "wrong stream identifier")
        self._last_peer_id = stream_id
        if len(self._streams) >= MAX_STREAMS or not self.usable:
            self._out.control(frames.reset_frame(stream_id, frames.REFUSED_STREAM))
            return None
        stream = Http2Stream(self, stream_id, self._peer_initial_window)
        self._streams[stream_id] = stream
        return stream

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
        for key, value in frames.parse_settings(payload):
            if key == frames.SETTINGS_INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ProtocolError(frames.FLOW_CONTROL_ERROR, "window is too large")
                change = value - self._peer_initial_window
                self._peer_initial_window = value
                for stream in self._streams.values():
                    if stream.send_window + change > frames.MAX_WINDOW:
                        raise ProtocolError(frames.FLOW_CONTROL_ERROR, "window is too large")
                    self._widen(stream, change)
            elif key == frames.SETTINGS_MAX_FRAME_SIZE:
                self._out.set_max_frame(value)
            elif key == frames.SETTINGS_HEADER_TABLE_SIZE:
                self._out.set_table_size(value)
            elif key == frames.SETTINGS_MAX_CONCURRENT_STREAMS:
                self._peer_streams_limit = value
        self._out.control(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _take_goaway(self, payload: bytes) -> None:
        last = frames.parse_u32(payload)
        text = payload[8:].decode("utf-8", "replace")
        self._going_away = "the peer is closing the connection" + (f": {text}" if text else "")
        for stream in list(self._streams.values()):
            if self._client and stream.id > last:
                stream.fail(ConnectionLostError(self._going_away))
                self.forget(stream)
