"""What a node has on its disk of each engine, so that the next one can remove what is left.

Everything else of an engine has its name: its groups, and in its directory the disk and the place
of its root file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from offload_core.smallfile import replace_small_file

_FILE = "engine.json"
_MAX_BYTES = 4096
DISK = "disk"
ROOT = "root"
LOG = "dockerd.log"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The first process of an engine; the numbers are 0 before it has one.

    Attributes:
        pid: of it.
        started: when it was started, in the kernel's ticks: numbers are used again.
    """

    pid: int = 0
    started: int = 0

    def write(self, folder: Path) -> None:
        """Write it to the engine's directory.

        Raises:
            OSError: it cannot be written.
        """
        replace_small_file(folder / _FILE, json.dumps(asdict(self)).encode())

    def kill(self) -> None:
        """Kill the process if it is still the same."""
        if self.pid <= 0:
            return
        with contextlib.suppress(OSError):
            process = os.pidfd_open(self.pid)
            try:
                if start_time(self.pid) == self.started:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)


def read_record(folder: Path) -> EngineRecord:
    """Return the record in a directory; one without a process where there is none."""
    try:
        with (folder / _FILE).open("rb") as file:
            values = json.loads(file.read(_MAX_BYTES))
        return EngineRecord(int(values["pid"]), int(values["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return EngineRecord()


def start_time(pid: int) -> int:
    """Return when a process was started, in ticks since the machine was; proc(5), stat.

    Raises:
        OSError: it is gone.
    """
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text.rpartition(b")")[2].split()[19])
