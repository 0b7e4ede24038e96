"""What commands and helpers of sessions know of each other, and where a helper begins."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

from offload_client.sessions.control import HelperAwayError, ask_helper
from offload_client.sessions.records import LOCK_FILE, engine_socket, helper_socket

POLL_SECONDS = 0.02
STOP_SECONDS = 20.0
LAST_FILES_SECONDS = 75.0
"""A helper that ends fetches files of containers for a minute at most."""


async def helper_answers(directory: Path) -> bool:
    """Return whether the helper of a session lives and serves docker's socket."""
    if not engine_socket(directory).exists():
        return False
    return await asked(directory, "status") is not None


async def asked(directory: Path, do: str, *, timeout: float = 5.0) -> dict[str, Any] | None:
    """Return a helper's answer; None when none answers in time."""
    from offload_client.bytepipe import in_thread

    try:
        return await in_thread(
            lambda: ask_helper(helper_socket(directory), do, timeout=timeout), name="ask-helper"
        )
    except HelperAwayError:
        return None


async def end_helper(directory: Path) -> list[str]:
    """End the helper of a session, which first brings back what containers wrote.

    Nothing happens when there is none. One that does not end goes when its record goes.

    Returns:
        Sentences about what it could not bring back.
    """
    answer = await asked(directory, "stop", timeout=LAST_FILES_SECONDS)
    if answer is None:
        return []
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if not _lives(directory):
            break
        await asyncio.sleep(POLL_SECONDS)
    return [str(warning) for warning in answer.get("warnings") or ()]


def _lives(directory: Path) -> bool:
    """Return whether a helper has its lock, which it keeps longer than its sockets."""
    try:
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def main() -> None:
    """Be the helper of a session: in the directory given, by the name that standard input says."""
    from offload_client.sessions import helper

    name = sys.stdin.buffer.readline()
    if not name.endswith(b"\n"):
        return
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    helper.run(Path(sys.argv[1]) / os.fsdecode(name[:-1]))


if __name__ == "__main__":
    main()
