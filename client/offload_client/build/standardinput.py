"""Standard input as the context or the Dockerfile of a build; waiting for it can be stopped."""

from __future__ import annotations

import io
import os
import select
from typing import Any

from offload_core.errors import ContextError
from offload_core.units import format_size

PIPE_BYTES = 64 << 10
"""What a pipe holds."""


class ReadingStoppedError(Exception):
    """Nobody wants standard input any more."""


class StopReading:
    """Makes a thread that waits for standard input give up; closed by its owner."""

    def __init__(self) -> None:
        self.waiting, self._waking = os.pipe2(os.O_CLOEXEC)

    def stop(self) -> None:
        """Make every read fail from now on; for any thread."""
        os.write(self._waking, b"x")

    def close(self) -> None:
        """Give the descriptors back, when no thread reads any more."""
        os.close(self.waiting)
        os.close(self._waking)


class StandardInput(io.RawIOBase):
    """Standard input, with what was looked at ahead; reads can be stopped."""

    def __init__(self, fd: int, stop: StopReading | None = None) -> None:
        """Read from a descriptor that stays open."""
        self._fd = fd
        self._stop = stop
        self._ahead = b""

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; 0 at the end.

        Raises:
            ReadingStoppedError: see `StopReading`.
            ContextError: it cannot be read.
        """
        view = memoryview(buffer)
        data = self._ahead[: len(view)] or self._read(len(view))
        self._ahead = self._ahead[len(data) :]
        view[: len(data)] = data
        return len(data)

    def peek(self, size: int) -> bytes:
        """Return the first bytes, which will be read again; fewer only at the end.

        Raises:
            ReadingStoppedError: see `StopReading`.
            ContextError: it cannot be read.
        """
        while len(self._ahead) < size and (data := self._read(PIPE_BYTES)):
            self._ahead += data
        return self._ahead[:size]

    def _read(self, size: int) -> bytes:
        try:
            if self._stop is not None:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                poll.register(self._stop.waiting, select.POLLIN)
                if any(fd == self._stop.waiting for fd, _ in poll.poll()):
                    raise ReadingStoppedError
            return os.read(self._fd, size)
        except OSError as error:
            raise ContextError(f"cannot read standard input: {error.strerror}") from error


def read_text(source: StandardInput, limit: int) -> bytes:
    """Return all of standard input, which is a Dockerfile.

    Raises:
        ContextError: it has more than `limit` bytes, or cannot be read.
        ReadingStoppedError: see `StopReading`.
    """
    data = io.BufferedReader(source, PIPE_BYTES).read(limit + 1)
    if len(data) > limit:
        raise ContextError(
            f"the Dockerfile on standard input has more than {format_size(limit)}",
            hint="a build context on standard input is a tar archive, plain or compressed with "
            "gzip, bzip2, xz or zstd",
        )
    return data
