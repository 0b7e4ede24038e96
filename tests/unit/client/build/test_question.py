"""Ctrl-C at a terminal that is not ours to ask at."""

from __future__ import annotations

import os
import pty
import sys
import time

ASKING = """
import asyncio, os, sys, termios
from pathlib import Path
from offload_client.build.question import Question
from offload_client.build.runrecord import RunRecord
from offload_client.invocation import Invocation

async def main():
    invocation = Invocation.of_process([])
    record = RunRecord("build-1", None)
    before = termios.tcgetattr(0)
    one, two = (Question(invocation, record, print, lambda: None, forfeits="") for _ in range(2))
    asked = one.ask() + 2 * (sys.argv[1] == "both" and two.ask())
    one.close()
    two.close()
    return 10 + asked + 4 * (termios.tcgetattr(0) != before)

if sys.argv[1] == "behind":
    os.setpgid(0, 0)
sys.exit(asyncio.run(main()))
"""
LEADER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"


def test_job_in_the_foreground_asks() -> None:
    assert asked("ahead") == 11


def test_job_in_the_background_does_not_touch_the_terminal() -> None:
    # It would be stopped for that, and then neither build nor end.
    assert asked("behind") == 10


def test_second_build_at_a_terminal_does_not_ask_and_the_terminal_is_left_as_it_was() -> None:
    assert asked("both") == 11


def asked(place: str) -> int:
    """Return the exit code of a process that asks at a terminal of a session of its own."""
    session, terminal = pty.fork()
    if session == 0:
        os.execv(sys.executable, [sys.executable, "-c", LEADER, ASKING, place])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ended, status = os.waitpid(session, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError("the process was stopped")
    finally:
        os.close(terminal)
