"""The sending side of a connection: what waits, in which order it leaves, flow control.

All sending goes through one task. Whatever collects while the sink is busy leaves together in
full frames; this is what makes many small messages cheap.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.headers import HeaderEncoder
from offload_builder.buildkit.h2.stream import StreamResetError
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.h2.frames import Buffer
    from offload_builder.buildkit.h2.headers import HeaderList
    from offload_builder.buildkit.h2.stream import Http2Stream

MAX_CONTROL = 8 * 2**20
"""Control bytes that may wait for a peer that does not read; then the connection ends."""
FLUSH_SIZE = 2**20
QUANTUM = 256 * 2**10
"""Bytes of one stream in a flush before the next stream has its turn."""


class Outbox:
    """Queues of one connection and the task that empties them into `sink`.

    `on_lost(reason)` is called when the sink fails; `on_end(stream)` when the end of a stream has
    left.
    """

    def __init__(
        self,
        sink: Callable[[list[Buffer]], Awaitable[None]],
        *,
        on_lost: Callable[[str], None],
        on_end: Callable[[Http2Stream], None],
    ) -> None:
        self._sink = sink
        self._on_lost = on_lost
        self._on_end = on_end
        self._encoder = HeaderEncoder()
        self._max_frame = frames.DEFAULT_MAX_FRAME
        self._window = frames.DEFAULT_WINDOW
        self._control: list[Buffer] = []
        self._control_size = 0
        self._sending: dict[int, Http2Stream] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._tasks = TaskSet()
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._writer = self._tasks.start(self._write_loop(), name="http2-writer")

    def finish(self) -> None:
        """Stop when everything that may leave has left."""
        self._stopping = True
        self._wake.set()

    async def close(self, timeout: float) -> None:
        """`finish`, wait at most `timeout` seconds for it, and stop."""
        self.finish()
        if self._writer is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._writer), timeout)
        await self._tasks.close()

    def control(self, data: bytes) -> None:
        """Queue frames that are not subject to flow control."""
        if self._stopping:
            return
        self._control.append(data)
        self._control_size += len(data)
        if self._control_size > MAX_CONTROL:
            self._on_lost("the peer does not read")
        self._wake.set()

    def headers(self, stream_id: int, headers: HeaderList) -> None:
        """Queue a header block; blocks are encoded in the order in which they leave."""
        self.control(self._encoder.encode(stream_id, headers, end_stream=False))

    def data(self, stream: Http2Stream) -> None:
        """Note that a stream has data or its end to send."""
        self._sending[stream.id] = stream
        self._wake.set()

    def drop(self, stream: Http2Stream) -> None:
        """Forget what a stream wants to send."""
        self._sending.pop(stream.id, None)

    def drop_all(self) -> None:
        """Forget what is queued and stop."""
        self._sending.clear()
        self._control.clear()
        self.finish()

    def widen(self, increment: int) -> None:
        """Follow a WINDOW_UPDATE of the connection.

        Raises:
            ProtocolError: the increment is zero or the sum too large.
        """
        self._window += increment
        if increment == 0 or self._window > frames.MAX_WINDOW:
            raise frames.ProtocolError(frames.FLOW_CONTROL_ERROR, "wrong WINDOW_UPDATE")
        self._wake.set()

    def set_max_frame(self, size: int) -> None:
        """Follow SETTINGS_MAX_FRAME_SIZE; beyond 64 KiB one stream would hold up the others."""
        self._max_frame = max(frames.DEFAULT_MAX_FRAME, min(size, 65_536))
        self._encoder.max_frame = self._max_frame

    def set_table_size(self, size: int) -> None:
        """Follow SETTINGS_HEADER_TABLE_SIZE."""
        self._encoder.set_table_size(size)

    async def _write_loop(self) -> None:
        try:
            while True:
                # One turn of the loop, so that what becomes ready now leaves together.
                await asyncio.sleep(0)
                parts = self._collect()
                if parts:
                    await self._sink(parts)
                elif self._stopping:
                    return
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except (StreamResetError, OSError) as error:
            self._on_lost(str(error) or type(error).__name__)

    def _collect(self) -> list[Buffer]:
        parts = self._control
        self._control, self._control_size = [], 0
        size = 0
        for stream in list(self._sending.values()):
            if size >= FLUSH_SIZE:
                break
            # It goes to the end of the queue if something of it is left that may leave.
            del self._sending[stream.id]
            size += self._collect_stream(stream, parts)
            if stream.pending_size and stream.send_window > 0:
                self._sending[stream.id] = stream
        return parts

    def _collect_stream(self, stream: Http2Stream, parts: list[Buffer]) -> int:
        allowed = min(stream.pending_size, stream.send_window, self._window, QUANTUM)
        if allowed > 0:
            stream.send_window -= allowed
            self._window -= allowed
            parts += stream.take_frames(allowed, self._max_frame)
        if stream.finished_sending:
            if stream.final_headers is None:
                parts.append(frames.frame(frames.DATA, frames.END_STREAM, stream.id))
            else:
                parts.append(self._encoder.encode(stream.id, stream.final_headers, end_stream=True))
            stream.local_ended = True
            self._on_end(stream)
        return max(allowed, 0)
