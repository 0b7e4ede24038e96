"""The output of a daemon: a file of bounded size, and the last lines in memory."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

TAIL_LINES = 40
_MAX_LINE = 4000
_MESSAGES = ("time=", "buildkitd:")
_BURST_BYTES = 1 << 20
"""What is taken at any rate."""


class DaemonLog:
    """Copies a pipe into `path`; the file before it is kept as `path` + ".1".

    Writes are small and go to the page cache, so they are made in the event loop.

    Args:
        path: of the file.
        max_bytes: of it.
        bytes_per_second: that are taken in the long run, so that somebody else who can write to
            the pipe keeps neither the event loop nor the disk busy; 0 for all.
    """

    def __init__(
        self, path: Path, max_bytes: int = 8 * 2**20, *, bytes_per_second: int = 0
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._bytes_per_second = bytes_per_second
        self._paid_until = -math.inf
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    async def copy(self, pipe: asyncio.StreamReader) -> None:
        """Copy until the end of the pipe; a full disk costs the file, not the daemon."""
        file, size = self._open()
        rest = b""
        try:
            while data := await pipe.read(65_536):
                rest = self._remember(rest + data)
                try:
                    if file is not None and size + len(data) > self._max_bytes:
                        file.close()
                        self._rotate()
                        file, size = self._open()
                    if file is not None:
                        size += file.write(data)
                except OSError:
                    _close(file)
                    file = None
                if self._bytes_per_second:
                    await self._take_time(len(data))
            self._remember(rest + b"\n" if rest else b"")
        finally:
            if file is not None:
                file.close()

    async def _take_time(self, taken: int) -> None:
        now = asyncio.get_running_loop().time()
        burst = _BURST_BYTES / self._bytes_per_second
        self._paid_until = max(self._paid_until, now - burst) + taken / self._bytes_per_second
        if self._paid_until > now:
            await asyncio.sleep(self._paid_until - now)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines, without stack traces."""
        return "\n".join(list(self._tail)[-lines:])

    def _remember(self, data: bytes) -> bytes:
        *lines, rest = data.split(b"\n")
        for line in lines:
            if not line.startswith(b"\t"):
                self._tail.append(line[:_MAX_LINE].decode("utf-8", "replace"))
            elif self._tail and not self._tail[-1].startswith(_MESSAGES):
                # Go's stack traces are pairs of lines and would push out the message.
                self._tail.pop()
        return rest[-_MAX_LINE:]

    def _open(self) -> tuple[FileIO | None, int]:
        try:
            file = self._path.open("ab", buffering=0)
        except OSError:
            return None, 0
        return file, file.tell()

    def _rotate(self) -> None:
        self._path.replace(self._path.with_name(self._path.name + ".1"))


def _close(file: FileIO | None) -> None:
    if file is not None:
        file.close()
