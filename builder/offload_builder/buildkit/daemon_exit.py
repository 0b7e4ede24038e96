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
        out_of_memory: the kernel ended processes of its control group for lack of memory while it
            ran, and it was killed by SIGKILL.
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
            return "buildkitd was killed by SIGKILL as memory ran out"
        if self.signal is not None:
            return f"buildkitd was killed by {signal.Signals(self.signal).name}"
        last = self.log_tail.rsplit("\n", 1)[-1].removeprefix("buildkitd: ")
        return f"buildkitd exited with code {self.code}" + (f": {last}" if last else "")


def count_oom_kills(pid: int, *, root: Path = Path("/")) -> int:
    """Return how many processes of a process's control group the kernel ended for lack of memory.

    Steps have groups of their own, and other services theirs; the kernel's count for the whole
    machine would blame theirs on the daemon. 0 where the kernel does not tell.

    Args:
        pid: of a process that runs; its group outlives it.
        root: of the file system.

    Source: the kernel's admin-guide/cgroup-v2 (memory.events.local) and
    cgroup-v1/memory (memory.oom_control).
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / f"proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            hierarchy = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
            events = hierarchy / group.lstrip("/")
            for name in ("memory.oom_control", "memory.events.local"):
                with contextlib.suppress(OSError):
                    for entry in (events / name).read_text().splitlines():
                        if entry.startswith("oom_kill "):
                            return int(entry.split()[1])
    return 0
