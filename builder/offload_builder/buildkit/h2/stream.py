"""One HTTP/2 stream: two byte queues with flow control, and headers in both directions."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.buildkit.h2.connection import Http2Connection
    from offload_builder.buildkit.h2.headers import HeaderList

RECEIVE_WINDOW = 2**20
"""Bytes that the peer may send on one stream before we read them."""
SEND_HIGH_WATER = 2**20
"""Unsent bytes above which a writer waits."""
SEND_LOW_WATER = SEND_HIGH_WATER // 2
_SMALL_PIECE = 4096


class StreamResetError(Exception):
    """The stream ended before its end, by the peer or with the connection."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ConnectionLostError(StreamResetError):
    """The connection below the stream is gone."""

    def __init__(self, message: str) -> None:
        super().__init__(frames.CANCEL, message)


class Http2Stream:
    """A stream of an `Http2Connection`; made by it only.

    One task may read; any number may write, each `write` stays in one piece.
    """

    def __init__(self, connection: Http2Connection, stream_id: int, send_window: int) -> None:
        self.id = stream_id
        self._connection = connection
        self._failure: StreamResetError | None = None
        self.on_failure: Callable[[], object] | None = None
        # Receiving.
        self.headers: HeaderList = []
        self.trailers: HeaderList = []
        self._received: list[bytes] = []
        self._receive_left = RECEIVE_WINDOW
        self._uncredited = 0
        self._remote_ended = False
        self._headers_come = asyncio.Event()
        self._readable = asyncio.Event()
        # Sending.
        self.send_window = send_window
        self._pending: deque[bytes | memoryview] = deque()
        self.pending_size = 0
        self._final: HeaderList | None = None
        self._ending = False
        self.local_ended = False
        self._writable = asyncio.Event()
        self._writable.set()

    # What the application calls.

    async def wait_headers(self) -> HeaderList:
        """Wait for the peer's first header block.

        Raises:
            StreamResetError: the stream ended first.
        """
        await self._headers_come.wait()
        if self._failure is not None and not self.headers:
            raise self._failure
        return self.headers

    async def read(self) -> bytes:
        """Return all bytes that have come, waiting for some; b"" at the end.

        The peer gets room for new ones only with this call.

        Raises:
            StreamResetError: the stream ended before its end.
        """
        while not self._received:
            if self._remote_ended:
                return b""
            if self._failure is not None:
                raise self._failure
            self._readable.clear()
            await self._readable.wait()
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        self._received.clear()
        self._uncredited += len(data)
        if self._uncredited >= RECEIVE_WINDOW // 2 and not self._remote_ended:
            self._receive_left += self._uncredited
            self._connection.send_control(frames.window_update_frame(self.id, self._uncredited))
            self._uncredited = 0
        return data

    def send_headers(self, headers: HeaderList) -> None:
        """Send the first header block; it goes before all data."""
        self._connection.send_headers(self.id, headers)

    async def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Queue bytes; wait while more than `SEND_HIGH_WATER` bytes are queued.

        Raises:
            StreamResetError: the stream has ended.
        """
        if self._failure is not None:
            raise self._failure
        if self._ending:
            raise StreamResetError(frames.STREAM_CLOSED, "write after the end of the stream")
        self._pending.extend(pieces)
        for piece in pieces:
            self.pending_size += len(piece)
        self._connection.wants_to_send(self)
        if self.pending_size > SEND_HIGH_WATER:
            self._writable.clear()
        if not self._writable.is_set():
            await self._writable.wait()
            if self._failure is not None:
                raise self._failure

    def end(self, trailers: HeaderList | None = None) -> None:
        """Say that nothing follows what is queued, with or without trailers."""
        if self._ending or self._failure is not None:
            return
        self._ending, self._final = True, trailers
        self._connection.wants_to_send(self)

    def reset(self, code: int = frames.CANCEL) -> None:
        """End the stream at once in both directions."""
        if self._failure is None and not (self._remote_ended and self.local_ended):
            self._connection.send_control(frames.reset_frame(self.id, code))
            self.fail(StreamResetError(code, "the stream was reset by us"))
            self._connection.forget(self)

    @property
    def failed(self) -> StreamResetError | None:
        """Why the stream ended early, or None."""
        return self._failure

    @property
    def closed(self) -> bool:
        """Whether both directions have ended in order."""
        return self._remote_ended and self.local_ended

    # What the connection calls.

    def take_headers(self, headers: HeaderList, *, end_stream: bool = False) -> None:
        """Take a header block of the peer: the first is `headers`, a later one `trailers`."""
        if self.headers:
            self.trailers = headers
        elif headers and headers[0][0] == ":status" and headers[0][1].startswith("1"):
            return  # An interim answer precedes the real one.
        else:
            self.headers = headers
        self._headers_come.set()
        if end_stream:
            self.take_end()

    def take_data(self, payload: bytes, flow_size: int) -> bool:
        """Take the payload of a DATA frame; False when the peer ignored our window."""
        self._receive_left -= flow_size
        if self._receive_left < 0:
            return False
        if flow_size > len(payload):
            self._uncredited += flow_size - len(payload)
        if payload:
            self._received.append(payload)
            self._readable.set()
        return True

    def take_end(self) -> None:
        """The peer sends nothing more."""
        self._remote_ended = True
        self._headers_come.set()
        self._readable.set()

    def fail(self, error: StreamResetError) -> None:
        """End the stream early; whoever waits hears of it."""
        if self._failure is None:
            self._failure = error
        self._pending.clear()
        self.pending_size = 0
        self._headers_come.set()
        self._readable.set()
        self._writable.set()
        if self.on_failure is not None:
            self.on_failure()

    @property
    def remote_ended(self) -> bool:
        """Whether the peer has said that nothing follows."""
        return self._remote_ended

    @property
    def finished_sending(self) -> bool:
        """Whether only the end of the stream is left to send."""
        return self._ending and self.pending_size == 0 and not self.local_ended

    @property
    def final_headers(self) -> HeaderList | None:
        """Trailers for the end of the stream."""
        return self._final

    def take_pending(self, limit: int) -> list[bytes | memoryview]:
        """Remove at most `limit` bytes from the queue."""
        taken: list[bytes | memoryview]
        if self.pending_size <= limit:
            taken = list(self._pending)
            size = self.pending_size
            self._pending.clear()
        else:
            taken, left, size = [], limit, limit
            while left:
                piece = self._pending.popleft()
                if len(piece) > left:
                    view = memoryview(piece)
                    taken.append(view[:left])
                    self._pending.appendleft(view[left:])
                    break
                taken.append(piece)
                left -= len(piece)
        self.pending_size -= size
        if self.pending_size <= SEND_LOW_WATER:
            self._writable.set()
        # Below some size a copy is cheaper than a piece that is handled by itself.
        return [b"".join(taken)] if len(taken) * _SMALL_PIECE > size else taken
