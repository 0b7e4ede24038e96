"""A terminal to paint on: a real pseudo terminal whose other end is a screen in memory."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import threading
import time
from typing import IO, Any, Self

import pyte


class Terminal:
    """A pseudo terminal with a screen that scrolls into a history.

    Attributes:
        stream: the side of the program that prints.
        received: every byte that it printed.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1.0)
        self.received = bytearray()
        self._parser = pyte.ByteStream(self.screen)
        self._ours, self._theirs = pty.openpty()
        self._lock = threading.Lock()
        self._ending = False
        self._resize(columns, rows)
        self.stream: IO[Any] = os.fdopen(self._theirs, "w", encoding="utf-8")
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending = True
        self._reader.join()
        self.stream.close()
        os.close(self._ours)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size as a window manager does; the content is cut, not wrapped anew."""
        with self._lock:
            self.screen.resize(rows, columns)
            self._resize(columns, rows)

    def lines(self) -> list[str]:
        """Return the screen without trailing blanks and empty last lines."""
        self.settle()
        with self._lock:
            lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def everything(self) -> list[str]:
        """Return what scrolled away and the screen."""
        lines = self.lines()
        with self._lock:
            above = [
                "".join(line[column].data for column in range(self.screen.columns)).rstrip()
                for line in self.screen.history.top
            ]
        return above + lines

    def settle(self) -> None:
        """Wait until what was printed has been read."""
        quiet = 0
        # Twice, because the kernel hands on what was written a moment later.
        while quiet < 2:
            time.sleep(0.03)
            with self._lock:
                ready, _, _ = select.select([self._ours], [], [], 0)
            quiet = 0 if ready else quiet + 1

    def until(self, text: str, seconds: float = 5.0) -> list[str]:
        """Return the screen as soon as it shows a text."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                lines = [line.rstrip() for line in self.screen.display]
            if any(text in line for line in lines):
                return lines
            time.sleep(0.01)
        raise AssertionError(f"{text!r} is not on the screen:\n" + "\n".join(lines))

    @property
    def cursor_visible(self) -> bool:
        """The cursor is shown."""
        self.settle()
        return not self.screen.cursor.hidden

    def colour_of(self, text: str) -> str:
        """Return the colour of the first character of a text on the screen."""
        self.settle()
        with self._lock:
            for row, line in enumerate(self.screen.display):
                if (column := line.find(text)) >= 0:
                    return str(self.screen.buffer[row][column].fg)
        raise AssertionError(f"{text!r} is not on the screen")

    def _resize(self, columns: int, rows: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._ours], [], [], 0.02)
            if not ready:
                if self._ending:
                    return
                continue
            with self._lock:
                # Within: who finds nothing to read under the lock sees all of it on the screen.
                data = os.read(self._ours, 65536)
                self._parser.feed(data)
                self.received += data
