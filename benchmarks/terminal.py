"""Running one command on a terminal whose other end reads fast or slowly."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.commands import Finished, Place, await_exit
from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ROWS, COLUMNS = 40, 120
_DRAIN_BYTES = 1 << 16


@dataclass(frozen=True)
class Reader:
    """How the terminal is read while the command runs.

    Attributes:
        size_bytes: at most so much at once.
        pause_seconds: between two reads.
    """

    size_bytes: int = _DRAIN_BYTES
    pause_seconds: float = 0.0


FAST = Reader()
SLOW = Reader(200, 0.05)
"""4 kB/s, an old modem."""


def run_on_terminal(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    folder: Path,
    reader: Reader = FAST,
    place: Place = nullcontext,
    tolerated: str = "",
) -> Finished:
    """Run a command from process start to exit on a pseudo terminal.

    Args:
        command: program and arguments.
        environment: all of it, but TERM.
        folder: working directory.
        reader: at the other end of the terminal.
        place: where it runs.
        tolerated: a failure whose output has this text is none.

    Raises:
        BenchmarkError: it failed or took too long; with what it showed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    shown = bytearray()
    ended = threading.Event()
    reading = threading.Thread(target=_read, args=(ours, reader, shown, ended))
    try:
        with place():
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                cwd=folder,
                env={**environment, "TERM": "xterm-256color"},
                start_new_session=True,
            )
            os.close(theirs)
            theirs = -1
        reading.start()
        try:
            code, seconds = await_exit(process, began)
        finally:
            ended.set()
            reading.join()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    text = shown.decode(errors="replace")
    if code != 0 and not (tolerated and tolerated in text):
        line = " ".join(str(part) for part in command)
        raise BenchmarkError(f"{line} ended with {code}:\n{text}")
    return Finished(seconds, text)


def _read(terminal: int, reader: Reader, shown: bytearray, ended: threading.Event) -> None:
    """Read until the other end is closed by everybody who has it."""
    while True:
        try:
            data = os.read(terminal, _DRAIN_BYTES if ended.is_set() else reader.size_bytes)
        except OSError:
            # EIO: nobody has the terminal open any more.
            return
        if not data:
            return
        shown += data
        if reader.pause_seconds:
            ended.wait(reader.pause_seconds)
