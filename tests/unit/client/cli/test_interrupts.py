"""Ctrl-C before a command has said what it means: an exit code, and nothing of Python's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent


@pytest.mark.parametrize("words", [("offload", "install"), ("docker-offload", "offload", "prune")])
def test_interrupt_outside_of_a_build_shows_no_traceback(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    # The program stands still where it opens this file.
    os.mkfifo(tmp_path / "config.json")
    environment = {
        "HOME": str(tmp_path), "DOCKER_CONFIG": str(tmp_path), "PATH": os.environ["PATH"],
    }  # fmt: skip
    with subprocess.Popen(
        [PROGRAMS / words[0], *words[1:]], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            writer = opened(tmp_path / "config.json")
            wait_asleep(process.pid)
            process.send_signal(signal.SIGINT)
            _, shown = process.communicate(timeout=10)
            os.close(writer)
        finally:
            process.kill()
    assert (process.returncode, shown.strip()) == (130, "")


def opened(pipe: Path) -> int:
    """Open a named pipe for writing, once somebody reads it."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def wait_asleep(pid: int) -> None:
    """Wait until a program sleeps in its read.

    Between the last look of Python at its signals and the system call there are some instructions;
    a signal that comes just then is noticed only after the call, which this file never ends.
    """
    deadline = time.monotonic() + 10
    # After the name in parentheses comes the state.
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "the program does not wait"
        time.sleep(0.01)
