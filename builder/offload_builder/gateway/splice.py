"""Two connections made one: bytes go both ways, untouched, as fast as the slower side takes them.

`asyncio.BufferedProtocol` because streams cost more than half of the throughput (measured, see
benchmarks): the kernel writes into a buffer that is there already.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 256 << 10
WRITE_HIGH_WATER_BYTES = 1 << 20
"""Bytes that wait for the slower side before the faster one is held back."""


class Half(asyncio.BufferedProtocol):
    """One of the two connections; what it reads goes to its peer."""

    def __init__(self, on_closed: Callable[[Half], None] | None = None) -> None:
        """Call `on_closed` when this connection is gone."""
        self.transport: asyncio.Transport | None = None
        self.last_activity = 0.0
        """Loop time of the last byte read."""
        self.bytes_read = 0
        self._peer: Half | None = None
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._loop = asyncio.get_running_loop()
        self._on_closed = on_closed
        self._ended = False
        self._paused_by_peer = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self.last_activity = self._loop.time()

    def join(self, peer: Half) -> None:
        """Send from now on everything to `peer`, and the other way round."""
        self._peer, peer._peer = peer, self

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return where the kernel shall write."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on what came."""
        self.last_activity = self._loop.time()
        self.bytes_read += nbytes
        if self._peer is not None:
            # A copy: what the peer cannot send at once is kept by reference on some versions.
            self._peer.write(bytes(self._view[:nbytes]))

    def eof_received(self) -> bool:
        """Pass on that no more comes; the other direction stays open."""
        self._ended = True
        if self._peer is None:
            return False
        self._peer.write_eof()
        if self._peer.has_ended:
            self.close()
            self._peer.close()
        return True

    def idle_since(self) -> float:
        """Return the loop time of the last byte in either direction."""
        other = self._peer.last_activity if self._peer is not None else 0.0
        return max(self.last_activity, other)

    @property
    def has_ended(self) -> bool:
        """Whether the other side will send no more."""
        return self._ended

    def pause_writing(self) -> None:
        """Hold the peer back: this side takes bytes too slowly."""
        if self._peer is not None:
            self._peer.hold(True)

    def resume_writing(self) -> None:
        """Let the peer go on."""
        if self._peer is not None:
            self._peer.hold(False)

    def hold(self, paused: bool) -> None:
        """Stop or resume reading."""
        if self.transport is None or self.transport.is_closing() or self._paused_by_peer == paused:
            return
        self._paused_by_peer = paused
        if paused:
            self.transport.pause_reading()
        elif not self._ended:
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other connection as well; what it still has to send is sent."""
        self._ended = True
        self.transport = None
        peer, self._peer = self._peer, None
        if peer is not None:
            if exc is None:
                peer.close()
            else:
                peer.abort()
        if self._on_closed is not None:
            self._on_closed(self)

    def write(self, data: bytes) -> None:
        """Send bytes to this side."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def write_eof(self) -> None:
        """Tell this side that no more comes."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write_eof()

    def close(self) -> None:
        """Close this side after what is still to be sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close this side at once."""
        if self.transport is not None:
            self.transport.abort()
