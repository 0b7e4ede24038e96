"""Running one command as a user does, and taking its time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

TIMEOUT_SECONDS = 600.0
Place = Callable[[], AbstractContextManager[object]]
"""Where commands run: entered around the start of each. `nullcontext` is here."""
_STEP = re.compile(r"^#(\d+) \[[^\]]*\b\d+/\d+\] (?!FROM )", re.MULTILINE)
# A step whose cached layers are fetched shows the layers, not "CACHED".
_CACHED = re.compile(r"^#(\d+) (?:CACHED|sha256:[0-9a-f]{64} )", re.MULTILINE)


@dataclass(frozen=True)
class Finished:
    """A command that has ended as it should."""

    seconds: float
    output: str

    def require_cached(self) -> float:
        """Return the seconds of a build in which no step ran.

        Raises:
            BenchmarkError: one ran, or there was none.
        """
        steps, cached = self._steps()
        if not steps or steps - cached:
            raise BenchmarkError(f"steps ran that should be cached:\n{self.output}")
        return self.seconds

    def require_executed(self) -> float:
        """Return the seconds of a build in which every step ran.

        Raises:
            BenchmarkError: one was cached, or there was none.
        """
        steps, cached = self._steps()
        if not steps or steps & cached:
            raise BenchmarkError(f"steps were cached that should run:\n{self.output}")
        return self.seconds

    def require_some_cached(self) -> float:
        """Return the seconds of a build in which most steps were cached, and some ran.

        Raises:
            BenchmarkError: none ran, or most did.
        """
        steps, cached = self._steps()
        if not steps - cached or len(cached) < len(steps) / 2:
            raise BenchmarkError(f"most steps should be cached, but not all:\n{self.output}")
        return self.seconds

    def require_some_executed(self) -> float:
        """Return the seconds of a build in which steps ran.

        Raises:
            BenchmarkError: none ran.
        """
        steps, cached = self._steps()
        if not steps - cached:
            raise BenchmarkError(f"no step ran:\n{self.output}")
        return self.seconds

    def _steps(self) -> tuple[set[str], set[str]]:
        return set(_STEP.findall(self.output)), set(_CACHED.findall(self.output))


def run(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    folder: Path,
    place: Place = nullcontext,
    tolerated: str = "",
) -> Finished:
    """Run a command from process start to exit; its output is no terminal.

    Args:
        command: program and arguments.
        environment: all of it.
        folder: working directory.
        place: where it runs.
        tolerated: a failure whose output has this text is none.

    Raises:
        BenchmarkError: it failed or took too long; with its output.
    """
    with tempfile.TemporaryFile(dir=folder) as output, place():
        # A file, not a pipe: nobody has to read while the command runs.
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
        code, seconds = await_exit(process, began)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code != 0 and not (tolerated and tolerated in text):
        line = " ".join(str(part) for part in command)
        raise BenchmarkError(f"{line} ended with {code}:\n{text}")
    return Finished(seconds, text)


def await_exit(process: subprocess.Popen[bytes], began: float) -> tuple[int, float]:
    """Return a command's exit code and its seconds since `began`; it leads a group of its own.

    One that takes longer than TIMEOUT_SECONDS is killed, with what it has started.
    """
    # Not wait(timeout): that polls, and adds up to 50 ms to what is measured.
    limit = threading.Timer(TIMEOUT_SECONDS, kill_group, (process.pid,))
    limit.start()
    try:
        code = process.wait()
        return code, time.perf_counter() - began
    except BaseException:
        kill_group(process.pid)
        process.wait()
        raise
    finally:
        limit.cancel()


def kill_group(pid: int) -> None:
    """Kill a command and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
