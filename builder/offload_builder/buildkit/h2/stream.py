"""One HTTP/2 stream: two byte queues with flow control, and headers in both directions."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.limits import RECEIVE_WINDOW
from offload_builder.buildkit.h2.runs import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.buildkit.h2.connection import Http2Connection
    from offload_builder.buildkit.h2.frames import Buffer
    from offload_builder.buildkit.h2.headers import HeaderList

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

    def __init__(
        self,
        connection: Http2Connection,
        stream_id: int,
        send_window: int,
        receive_window: int = RECEIVE_WINDOW,
    ) -> None:
        self.id = stream_id
        self._connection = connection
        self._failure: StreamResetError | None = None
        self.on_failure: Callable[[], object] | None = None
        # Receiving.
        self.headers: HeaderList = []
        self.held_headers = 0
        """Bytes that the connection counts."""
        self.trailers: HeaderList = []
        self._received: list[bytes] = []
        self._receive_window = self._receive_left = receive_window
        self._unread = 0
        self._uncredited = 0
        self._remote_ended = False
        self._headers_come = asyncio.Event()
        self._readable = asyncio.Event()
        # Sending.
        self.send_window = send_window
        self._pending: deque[bytes | memoryview | Run] = deque()
        self._has_runs = False
        self.pending_size = 0
        self._final: HeaderList | None = None
        self._ending = False
        self.local_ended = False
        self._writable = asyncio.Event()
        self._writable.set()
        # Passing on.
        self._target: Http2Stream | None = None
        self._source: Http2Stream | None = None
        self._passed = 0

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
        self._give_room(len(data))
        return data

    def _give_room(self, size: int) -> None:
        """Let the peer send again as much as was taken from here."""
        self._connection.note_read(self.drop_unread())
        self._uncredited += size
        if self._uncredited >= self._receive_window // 2 and not self._remote_ended:
            self._receive_left += self._uncredited
            self._connection.send_control(frames.window_update_frame(self.id, self._uncredited))
            self._uncredited = 0

    async def pass_on(self, target: Http2Stream) -> None:
        """Give all that comes to another stream, until the peer has ended this one.

        Frames that come together leave together, as they are. The peer gets room for new bytes
        as long as the target has not too much unsent. The end itself is not passed on.

        Raises:
            StreamResetError: one of the two ended early.
        """
        self._target, target._source = target, self
        try:
            received, self._received = self._received, []
            for data in received:
                self._hand_over(data, len(data))
            if self._failure is None and not self._remote_ended:
                self._connection.join(self.id, target.id)
            while not self._remote_ended:
                if (failure := self._failure or target.failed) is not None:
                    raise failure
                self._readable.clear()
                await self._readable.wait()
            if target.failed is not None:
                raise target.failed
        finally:
            self._connection.join(self.id, 0)
            self._target = target._source = None
            self._connection.note_read(self.drop_unread())
            self._passed = 0

    def _hand_over(self, piece: bytes | Run, size: int) -> None:
        target = self._target
        if target is None or target.failed is not None:
            return  # It ends in a moment; meanwhile the peer may fill its window.
        self._passed += size
        target.take_over(piece, size)
        self._settle(target)

    def _settle(self, target: Http2Stream) -> None:
        if self._passed and target.pending_size <= SEND_HIGH_WATER:
            size, self._passed = self._passed, 0
            self._give_room(size)

    def take_over(self, piece: bytes | Run, size: int) -> None:
        """Queue what another stream has received."""
        if self._ending:
            return
        self._has_runs = self._has_runs or isinstance(piece, Run)
        self._pending.append(piece)
        self.pending_size += size
        self._connection.wants_to_send(self)

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
        self._unread += flow_size
        self._receive_left -= flow_size
        if self._receive_left < 0:
            return False
        if flow_size > len(payload):
            self._uncredited += flow_size - len(payload)
        if payload and self._target is not None:
            self._hand_over(payload, len(payload))
        elif payload:
            self._received.append(payload)
            self._readable.set()
        return True

    def take_run(self, run: bytes, size: int) -> bool:
        """Take DATA frames for the stream that this one is passed on to; see `take_data`."""
        self._unread += size
        self._receive_left -= size
        if self._receive_left < 0:
            return False
        self._hand_over(Run(run, size), size)
        return True

    def drop_unread(self) -> int:
        """Return how many bytes on the wire were not accounted for as read yet, and forget them."""
        size, self._unread = self._unread, 0
        return size

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
        self.pending_size, self._has_runs = 0, False
        if self._source is not None:
            self._source._readable.set()
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

    def take_frames(self, limit: int, max_frame: int) -> list[Buffer]:
        """Remove at most `limit` bytes from the queue, in DATA frames."""
        if self._has_runs:
            parts = self._take_runs(limit, max_frame)
        else:
            parts = frames.data_frames(self.id, self._take_pieces(limit), limit, max_frame)
        self.pending_size -= limit
        if self.pending_size <= SEND_LOW_WATER:
            self._writable.set()
            if self._source is not None:
                self._source._settle(self)
        return parts

    def _take_runs(self, limit: int, max_frame: int) -> list[Buffer]:
        parts: list[Buffer] = []
        pending, left = self._pending, limit
        while left:
            piece = pending.popleft()
            if isinstance(piece, Run):
                if piece.size > left:
                    piece, rest = piece.cut(left)
                    pending.extendleft(reversed(rest))
                if piece.size:
                    parts.append(piece.data)
                left -= piece.size
                continue
            view = memoryview(piece)
            if len(view) > left:
                pending.appendleft(view[left:])
                view = view[:left]
            parts += frames.data_frames(self.id, (view,), len(view), max_frame)
            left -= len(view)
        self._has_runs = bool(pending)
        return parts

    def _take_pieces(self, limit: int) -> list[bytes | memoryview]:
        taken: list[bytes | memoryview] = []
        left = limit
        while left:
            piece = self._pending.popleft()
            if isinstance(piece, Run):
                raise TypeError("a run among pieces")
            if len(piece) > left:
                view = memoryview(piece)
                taken.append(view[:left])
                self._pending.appendleft(view[left:])
                break
            taken.append(piece)
            left -= len(piece)
        # Below some size a copy is cheaper than a piece that is handled by itself.
        return [b"".join(taken)] if len(taken) * _SMALL_PIECE > limit else taken
