"""Two connections made one: bytes go both ways, untouched, as fast as the slower side takes them.

The kernel moves them from socket to socket by way of a pipe, so they never come into this process:
see splice(2). A pipe is lent to a direction only while bytes are on their way, so connections that
are silent cost two file descriptors and no buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PIPE_BYTES = 1 << 20
"""Bytes that wait for the slower side before the faster one is held back."""
MAX_FREE_PIPES = 16
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """A pipe that never blocks."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            OSError: there are no file descriptors left.
        """
        self.out, self.into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # More than the pages that a user may have is refused; then it moves less at a time.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.out)
        os.close(self.into)


class PipeStore:
    """Empty pipes, kept for the next who needs one."""

    def __init__(self) -> None:
        self._free: list[Pipe] = []

    def take(self) -> Pipe:
        """Return an empty pipe.

        Raises:
            OSError: there are no file descriptors left.
        """
        return self._free.pop() if self._free else Pipe()

    def give(self, pipe: Pipe) -> None:
        """Take an empty pipe back."""
        if len(self._free) < MAX_FREE_PIPES:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close all that are here."""
        for pipe in self._free:
            pipe.close()
        self._free.clear()


class Splice:
    """Two connected sockets that are one until both sides have ended, or one of them breaks.

    Args:
        left: one socket, not blocking; closed in the end.
        right: the other.
        pipes: where pipes come from.
        on_closed: hears of the end.
    """

    def __init__(
        self,
        left: socket.socket,
        right: socket.socket,
        pipes: PipeStore,
        on_closed: Callable[[Splice], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.last_activity = self.loop.time()
        """Loop time of the last byte in either direction."""
        self.pipes = pipes
        self._sockets = (left, right)
        self._ways = (_Way(self, left, right), _Way(self, right, left))
        self._on_closed = on_closed
        self._closed = False

    def start(self) -> None:
        """Begin to move bytes."""
        for way in self._ways:
            way.start()

    def way_ended(self) -> None:
        """Hear that one direction has nothing more to move."""
        if all(way.ended for way in self._ways):
            self.close()

    def close(self) -> None:
        """Close both sockets; safe to call again."""
        if self._closed:
            return
        self._closed = True
        for way in self._ways:
            way.stop()
        for connection in self._sockets:
            connection.close()
        self._on_closed(self)


class _Way:
    """One direction."""

    def __init__(self, owner: Splice, source: socket.socket, target: socket.socket) -> None:
        self.ended = False
        self._owner = owner
        self._loop = owner.loop
        self._source, self._target = source, target
        self._pipe: Pipe | None = None
        self._held = 0
        self._no_more = False
        self._writing = False

    def start(self) -> None:
        """Move what comes."""
        self._loop.add_reader(self._source, self._read)

    def stop(self) -> None:
        """Move nothing more."""
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._target)
        if self._pipe is not None:
            # What it holds would go to the next one.
            self._pipe.close()
            self._pipe = None

    def _read(self) -> None:
        self._owner.last_activity = self._loop.time()
        try:
            pipe = self._pipe = self._pipe or self._owner.pipes.take()
            taken = os.splice(self._source.fileno(), pipe.into, PIPE_BYTES, flags=_FLAGS)
        except BlockingIOError:
            self._return_pipe()
            return
        except OSError:
            self._owner.close()
            return
        self._held += taken
        if not taken:
            self._no_more = True
            self._loop.remove_reader(self._source)
        self._write()

    def _write(self) -> None:
        try:
            while self._held and self._pipe is not None:
                moved = os.splice(self._pipe.out, self._target.fileno(), self._held, flags=_FLAGS)
                self._held -= moved
                self._owner.last_activity = self._loop.time()
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.remove_reader(self._source)
                self._loop.add_writer(self._target, self._write)
            return
        except OSError:
            self._owner.close()
            return
        self._return_pipe()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._target)
            if not self._no_more:
                self._loop.add_reader(self._source, self._read)
        if self._no_more:
            self._end()

    def _return_pipe(self) -> None:
        if self._pipe is not None and not self._held:
            self._owner.pipes.give(self._pipe)
            self._pipe = None

    def _end(self) -> None:
        """Pass on that no more comes; the other direction stays open."""
        self.ended = True
        with contextlib.suppress(OSError):
            self._target.shutdown(socket.SHUT_WR)
        self._owner.way_ended()
