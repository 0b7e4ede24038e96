"""A helper is started early, taken once, and ends when there is nothing for it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from offload_client.sessions import helperprocess
from offload_client.sessions.helperprocess import HelperProcess, early_helper
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

WAITS = "import sys; sys.stdin.buffer.readline()"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Start small processes that wait as helpers do; return them."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*_: Any) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE))
        return made[-1]

    monkeypatch.setattr(helperprocess, "_start", start)
    return made


def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that was left to itself has ended."""
    os.waitpid(process.pid, 0)


def test_helper_that_nobody_takes_ends(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    with pytest.raises(RuntimeError), early_helper(tmp_path, {}, tmp_path):
        raise RuntimeError
    assert len(started) == 1
    ended(started[0])


def test_early_helper_is_taken_once(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    with early_helper(tmp_path, {}, tmp_path):
        for _ in range(2):
            with HelperProcess(tmp_path / "default", {}, tmp_path):
                pass
        assert len(started) == 2
        with HelperProcess(tmp_path / "default", {}, tmp_path):
            assert len(started) == 3
    for process in started:
        ended(process)


def test_helper_that_cannot_be_started_is_said_by_whoever_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(helperprocess, "_start", fail)
    with early_helper(tmp_path, {}, tmp_path):
        helper = HelperProcess(tmp_path / "default", {}, tmp_path)
        with pytest.raises(ConfigError, match="Cannot allocate memory"), helper:
            pass
