"""How much memory a group of processes takes at its worst moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SAMPLE_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of processes; what several of them share counts several times."""
    return sum(_resident(pid) for pid in set(pids))


class PeakMemory:
    """Samples the resident memory of a changing group of processes; a context manager.

    Args:
        group: returns the processes of the moment; called in a thread.
    """

    def __init__(self, group: Callable[[], Iterable[int]]) -> None:
        self.peak_bytes = 0
        self._group = group
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self._group()))


def _resident(pid: int) -> int:
    try:
        # Second field of proc_pid_statm(5): resident pages.
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
