"""What the steps of one BuildKit have written to the node's disk, and which of them run.

A step writes into the upper directory of its overlay, and into cache mounts. What it has deleted
and still holds open is in no directory: that is seen in its processes.
Sources: BuildKit's executor/runcexecutor (a bundle per container), proc(5) mountinfo.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from offload_builder.buildkit.daemon_leftovers import leftover_bundles
from offload_builder.mountinfo import read_mounts
from offload_builder.node.stepspec import read_specification

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from offload_builder.node.buildgroups import BuildGroups

_BLOCK_BYTES = 512
_ENTRY_BYTES = 256
"""What the kernel keeps of a file itself, so that empty files count as well."""
_MEASURE_SECONDS = 10.0
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(eq=False, slots=True)
class WritingStep:
    """A container that runs, or has ended.

    Attributes:
        arguments: of its process.
        group: its control group, below the root of the hierarchies.
        own: its own upper directory; None where it has no overlay.
        shared: directories of cache mounts, with what was in them.
        held: the same directories, with what is in them, as measured last.
        ended: its bundle is gone.
        written: bytes, as measured last.
    """

    arguments: tuple[str, ...]
    group: str
    own: Path | None = None
    shared: dict[Path, int] = field(default_factory=dict)
    held: dict[Path, int] = field(default_factory=dict)
    ended: bool = False
    written: int = 0

    @property
    def trace(self) -> str:
        """Name of the control group of its build; empty without one."""
        parts = self.group.split("/")
        return parts[3] if len(parts) > 4 else ""


class StepDisk:
    """The steps of one BuildKit. Its methods read directories: call them in one worker thread.

    Args:
        root: directory of BuildKit.
        daemon_pid: returns its process; None while it does not run.
        groups: of its builds.
    """

    def __init__(
        self, root: Path, daemon_pid: Callable[[], int | None], groups: BuildGroups
    ) -> None:
        self.root = root.absolute()
        self._daemon_pid = daemon_pid
        self._groups = groups
        self._known: dict[Path, WritingStep] = {}

    def look(self) -> list[WritingStep]:
        """Return the steps that run, and those that have ended since the last call."""
        pid = self._daemon_pid()
        if pid is None:
            self._known.clear()
            return []
        bundles = set(leftover_bundles(self.root))
        ended = [self._known.pop(bundle) for bundle in set(self._known) - bundles]
        for step in ended:
            step.ended = True
        if fresh := bundles - set(self._known):
            uppers = dict(_uppers(pid))
            for bundle in fresh:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    if (begun := self._read(bundle, uppers)) is not None:
                        self._known[bundle] = begun
        return [*self._known.values(), *ended]

    def measure(self, step: WritingStep) -> int:
        """Return the bytes that a step has written, at least: it takes a few seconds at most."""
        total = 0
        if step.own is not None:
            total += tree_bytes(step.own)[0]
        for folder, before in step.shared.items():
            step.held[folder] = tree_bytes(folder)[0]
            total += max(0, step.held[folder] - before)
        if not step.ended:
            total += unlinked_bytes(self._groups.processes(step.group))
        # A step that has failed takes its files along.
        step.written = max(total, step.written) if step.ended else total
        return step.written

    def is_building(self, trace: str) -> bool:
        """Return whether a control group is that of a build that runs."""
        return self._groups.is_open(trace)

    def end(self, step: WritingStep) -> None:
        """Kill the processes of a step."""
        for pid in self._groups.processes(step.group):
            with contextlib.suppress(OSError):
                os.kill(pid, 9)

    def _read(self, bundle: Path, uppers: dict[Path, Path]) -> WritingStep | None:
        """Return a step that runs; None for one that has not begun.

        Until then its control group may not be in its specification yet, and what is put into its
        cache mounts is not its own.
        """
        own = uppers.get(bundle / "rootfs")
        config = read_specification(bundle)
        step = WritingStep(
            tuple(map(str, config["process"]["args"])), str(config["linux"]["cgroupsPath"]), own
        )
        if not self._groups.processes(step.group):
            return None
        for mount in config["mounts"]:
            source = Path(str(mount.get("source", "")))
            if "ro" in mount.get("options", ()) or not source.is_relative_to(self.root):
                continue
            folder = uppers.get(source, source)
            if folder != own and folder.is_dir() and not folder.is_relative_to(bundle):
                before, whole = tree_bytes(folder)
                # Of two counts that came to no end, the difference says nothing.
                if whole:
                    step.shared[folder] = before
        return step


def written_together(steps: Iterable[WritingStep]) -> int:
    """Return the bytes that steps of one build have written, as measured last.

    What grew in a cache mount that several of them had at once is counted for each, but it is
    there once.
    """
    total = 0
    spans: dict[Path, list[tuple[int, int]]] = {}
    for step in steps:
        total += step.written
        for folder, before in step.shared.items():
            spans.setdefault(folder, []).append((before, step.held.get(folder, before)))
    for found in spans.values():
        counted = sum(max(0, after - before) for before, after in found)
        most = max(after for _, after in found) - min(before for before, _ in found)
        total -= max(0, counted - max(0, most))
    return total


def tree_bytes(folder: Path) -> tuple[int, bool]:
    """Return what a directory takes on the disk, and whether that is all of it.

    What takes too long to count is left out.
    """
    total, links = 0, set()
    deadline = time.monotonic() + _MEASURE_SECONDS
    pending = [os.fspath(folder)]
    while pending and time.monotonic() < deadline:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
                        if (found.st_dev, found.st_ino) in links:
                            continue
                        links.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * _BLOCK_BYTES + _ENTRY_BYTES
                    if stat.S_ISDIR(found.st_mode):
                        pending.append(entry.path)
    return total, not pending


def unlinked_bytes(pids: Iterable[int]) -> int:
    """Return what processes hold open of files on disks that have no name any more.

    A file that several of them have inherited counts once, and one in memory not at all.
    """
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            in_memory = _memory_devices(pid)
            for entry in entries:
                with contextlib.suppress(OSError):
                    found = entry.stat()
                    gone = stat.S_ISREG(found.st_mode) and not found.st_nlink
                    if gone and found.st_dev not in in_memory:
                        sizes[found.st_dev, found.st_ino] = found.st_blocks * _BLOCK_BYTES
    return sum(sizes.values())


def _memory_devices(pid: int) -> set[int]:
    """Return the devices of the file systems in memory that a process sees."""
    seen = {mount.device for mount in read_mounts(pid) if mount.kind in _IN_MEMORY}
    return seen | {_memfd_device()}


@functools.cache
def _memfd_device() -> int:
    """Return the kernel's own file system for memfd_create(2), which is mounted nowhere."""
    memory = os.memfd_create("disk-watch")
    try:
        return os.fstat(memory).st_dev
    finally:
        os.close(memory)


def _uppers(pid: int) -> Iterator[tuple[Path, Path]]:
    """Yield the mount points of overlays in the place of a process, with what they write to."""
    with contextlib.suppress(OSError):
        for mount in read_mounts(pid):
            if mount.kind == "overlay" and (upper := mount.options.get("upperdir")):
                yield Path(mount.point), Path(upper)
