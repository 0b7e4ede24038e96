"""How a daemon ended."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DaemonExit:
    """How a daemon ended.

    Attributes:
        code: exit code; None when a signal ended it.
        signal: number of the signal; None when it exited.
        expected: we stopped it.
        out_of_memory: the kernel ended processes for lack of memory while it ran, and it was
            killed by SIGKILL.
        log_tail: its last lines.
    """

    code: int | None
    signal: int | None
    expected: bool
    out_of_memory: bool
    log_tail: str

    def describe(self) -> str:
        """Return one clause for people."""
        if self.expected:
            return "buildkitd was stopped"
        if self.out_of_memory:
            return "buildkitd was killed because the machine ran out of memory"
        if self.signal is not None:
            return f"buildkitd was killed by {signal.Signals(self.signal).name}"
        last = self.log_tail.rsplit("\n", 1)[-1].removeprefix("buildkitd: ")
        return f"buildkitd exited with code {self.code}" + (f": {last}" if last else "")


def count_oom_kills() -> int:
    """Return how many processes the kernel has ended for lack of memory since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
