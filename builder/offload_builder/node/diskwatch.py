"""Ends steps that write more than their build may, or that fill the node's disk.

The kernel bounds what a directory holds on file systems with project quotas only, and BuildKit's
own bound is for its cache, not for a step that runs. So free space is looked at a few times a
second, which costs nothing; directories are counted when a build may have come to its bound, or
when the disk is nearly full.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.outofmemory import is_step_of
from offload_builder.node.stepdisk import written_together
from offload_core.units import format_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from offload_builder.node.stepdisk import StepDisk, WritingStep

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.25
_COUNT_SECONDS = 5.0
"""Files that others delete hide what a build writes, so it is counted so often at least."""
_COUNT_SHARE = 10
"""Counting takes a tenth of the time at most."""
_PAUSE_SECONDS = 5.0
"""BuildKit needs a moment to remove what a step that was ended has written."""
_MIN_BLAMED_BYTES = 16 << 20
_MAX_RESERVE_SHARE = 0.1
_MAX_NOTES = 200


@dataclass(frozen=True, slots=True)
class DiskStop:
    """Why a step was ended.

    Attributes:
        arguments: of its process.
        sentence: for people.
        at: seconds since 1970.
    """

    arguments: tuple[str, ...]
    sentence: str
    at: float


class DiskNotes:
    """The steps of one BuildKit that were ended for the disk's sake."""

    def __init__(self) -> None:
        self._notes: deque[DiskStop] = deque(maxlen=_MAX_NOTES)

    def add(self, stop: DiskStop) -> None:
        """Note one."""
        self._notes.append(stop)

    def find(self, message: str, since: float) -> str:
        """Return why the step that a failure tells of was ended; empty when it was not by us."""
        for note in reversed(self._notes):
            if note.at >= since and is_step_of(message, note.arguments):
                return note.sentence
        return ""


@dataclass(frozen=True, slots=True)
class Watched:
    """The BuildKit of a project, as the watch sees it.

    Attributes:
        disk: its steps.
        limit_bytes: what the steps of one build may write; 0 is no bound.
        notes: hears of steps that were ended.
        busy: whether a build uses it.
    """

    disk: StepDisk
    limit_bytes: int
    notes: DiskNotes
    busy: Callable[[], bool]


class _Counted:
    """The builds of one BuildKit, with what they have written."""

    def __init__(self) -> None:
        self.steps: dict[str, set[WritingStep]] = {}
        self.free_bytes = 0
        self.due_at = 0.0


class DiskWatch:
    """Looks after the disk of a node; run it as a task.

    Args:
        path: a directory on the disk.
        reserve_bytes: free space that steps must leave, at most a tenth of the disk; 0 for none.
        watched: returns the BuildKits that are open.
    """

    def __init__(
        self, path: Path, reserve_bytes: int, watched: Callable[[], Iterable[Watched]]
    ) -> None:
        self._path = path
        self._reserve = reserve_bytes
        self._watched = watched
        self._counted: dict[StepDisk, _Counted] = {}
        self._quiet_until = 0.0

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="disk-watch")
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                if busy := [item for item in self._watched() if item.busy()]:
                    try:
                        await loop.run_in_executor(thread, self._look, busy)
                    except Exception as error:
                        # The next look may work; without any, a step could fill the disk.
                        log.error("disk.watch.failed", exc_info=error)
                        await asyncio.sleep(_PAUSE_SECONDS)
                else:
                    self._counted.clear()
        finally:
            thread.shutdown(wait=False)

    def _look(self, busy: list[Watched]) -> None:
        for gone in self._counted.keys() - {item.disk for item in busy}:
            del self._counted[gone]
        free, reserve = self._free()
        # Before it is due, so that it is known by then what cache mounts held before.
        low = free < 2 * reserve
        running: list[tuple[Watched, WritingStep]] = []
        for item in busy:
            if item.limit_bytes or low:
                steps = item.disk.look()
                if item.limit_bytes:
                    self._hold_to_limit(item, steps, free)
                running += [(item, step) for step in steps if not step.ended]
        if free < reserve and time.monotonic() >= self._quiet_until:
            self._keep_reserve(running, free)

    def _free(self) -> tuple[int, int]:
        """Return the free bytes, and how many there should be."""
        found = os.statvfs(self._path)
        most = round(found.f_blocks * found.f_frsize * _MAX_RESERVE_SHARE)
        return found.f_bavail * found.f_frsize, min(self._reserve, most)

    def _hold_to_limit(self, item: Watched, steps: list[WritingStep], free: int) -> None:
        counted = self._counted.setdefault(item.disk, _Counted())
        for step in steps:
            known = counted.steps.setdefault(step.trace, set())
            if step.ended:
                item.disk.measure(step)
            known.add(step)
        running = {
            trace: steps
            for trace, steps in counted.steps.items()
            if any(not step.ended for step in steps)
        }
        for trace in [name for name in counted.steps if name not in running]:
            if not item.disk.is_building(trace):
                del counted.steps[trace]
        most = max((written_together(steps) for steps in running.values()), default=0)
        left = item.limit_bytes - most
        if not running or (
            counted.free_bytes - free < left / 2 and time.monotonic() < counted.due_at
        ):
            return
        began = time.monotonic()
        for ours in running.values():
            for step in ours:
                if not step.ended:
                    item.disk.measure(step)
            if (total := written_together(ours)) > item.limit_bytes:
                sentence = (
                    f"The build was stopped: its steps have written {format_memory(total)} to the "
                    f"node's disk, and a build may write {format_memory(item.limit_bytes)}. Let it "
                    "write less, or ask who runs the node for more (build_disk)."
                )
                self._end(item, [step for step in ours if not step.ended], sentence)
        took = time.monotonic() - began
        counted.free_bytes = free
        counted.due_at = time.monotonic() + max(_COUNT_SECONDS, took * _COUNT_SHARE)

    def _keep_reserve(self, running: list[tuple[Watched, WritingStep]], free: int) -> None:
        running = sorted(running, key=lambda pair: pair[0].disk.measure(pair[1]))
        self._quiet_until = time.monotonic() + _PAUSE_SECONDS
        if not running or running[-1][1].written < _MIN_BLAMED_BYTES:
            log.warning("disk.nearly_full", free_bytes=free, reserve_bytes=self._reserve)
            return
        item, step = running[-1]
        sentence = (
            f"The step was ended: the node's disk is nearly full ({format_memory(free)} left), and "
            f"of all steps that run it had written the most, {format_memory(step.written)}. Let it "
            "write less, or ask who runs the node for a larger disk."
        )
        self._end(item, [step], sentence)

    @staticmethod
    def _end(item: Watched, steps: list[WritingStep], sentence: str) -> None:
        for step in steps:
            # Known before BuildKit hears of its end.
            item.notes.add(DiskStop(step.arguments, sentence, time.time()))
            item.disk.end(step)
            log.warning(
                "disk.step.ended",
                root=str(item.disk.root),
                written_bytes=step.written,
                reason=sentence,
            )
