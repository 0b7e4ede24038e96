"""Control groups of builds: one for each, below which all of its steps run.

A build's group is made before BuildKit hears of the build, with its bounds; the program in runc's
place puts the steps there (`buildkit.stepgroups`). It goes a while after the build, since a step
may be about to start: below a group that is not there the kernel would bound nothing.

Sources: the kernel's admin-guide/cgroup-v2 and cgroup-v1/{memory,pids}, scheduler/sched-bwc.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.stepbounds import PERIOD_MICROSECONDS
from offload_builder.buildkit.stepgroups import OTHERS, groups_shell, trace_of
from offload_builder.node.buildlimits import BuildLimits
from offload_builder.node.grouptrees import each_group, processes_of, remove_groups
from offload_core.errors import ConfigError, NodeLostError

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = structlog.get_logger(__name__)

HIERARCHY = Path("/sys/fs/cgroup")
ROOT = "offload-builds"
KEPT_SECONDS = 60.0
"""A group stays so long after its build."""
_CONTROLLERS = ("memory", "cpu", "pids")


class BuildGroups:
    """The groups of the builds of one BuildKit.

    Args:
        owner: directory of that BuildKit, which names its groups.
        limits: of each build.
        hierarchy: where the kernel shows control groups.

    Attributes:
        place: of the groups, an absolute path below the root of each hierarchy.
    """

    def __init__(self, owner: Path, limits: BuildLimits, hierarchy: Path = HIERARCHY) -> None:
        key = hashlib.sha256(os.fsencode(owner.absolute())).hexdigest()[:16]
        self.place = f"/{ROOT}/{key}"
        self._limits = limits
        self._hierarchy = hierarchy
        self._version_1 = (hierarchy / "memory" / "cgroup.procs").exists()
        self._open: dict[str, int] = {}
        self._ended: dict[str, float] = {}

    @property
    def shell(self) -> str:
        """What the program in runc's place has to do before each step; empty without bounds."""
        return groups_shell(self.place) if self._limits.any else ""

    def open(self) -> None:
        """Make the group of steps whose build is not known; those of an earlier run go.

        Raises:
            ConfigError: control groups cannot be had.
        """
        if not self._limits.any:
            return
        self._remove_all()
        try:
            self._make(OTHERS)
        except OSError as error:
            raise ConfigError(
                f"builds cannot be bounded: {error.strerror} ({error.filename})",
                hint="build_memory, build_cpus, build_pids and build_disk need root, and the "
                "kernel's control groups memory, cpu and pids below /sys/fs/cgroup",
            ) from error

    def close(self) -> None:
        """Remove all groups; what still runs keeps its own."""
        if self._limits.any:
            self._remove_all()

    @contextmanager
    def building(self, build_id: str) -> Iterator[str]:
        """Have a group for a build while the block runs; yields its trace, empty without bounds.

        Raises:
            NodeLostError: the kernel does not make one.
        """
        if not self._limits.any:
            yield ""
            return
        trace = trace_of(build_id)
        try:
            self._make(trace)
        except OSError as error:
            raise NodeLostError(
                f"the build cannot be bounded: {error.strerror} ({error.filename})"
            ) from error
        self._ended.pop(trace, None)
        self._open[trace] = self._open.get(trace, 0) + 1
        try:
            yield trace
        finally:
            self._open[trace] -= 1
            if not self._open[trace]:
                del self._open[trace]
                self._ended[trace] = time.monotonic()

    def is_open(self, trace: str) -> bool:
        """Return whether a group is that of a build that runs."""
        return trace in self._open

    def sweep(self) -> None:
        """Remove groups whose builds ended a while ago."""
        limit = time.monotonic() - KEPT_SECONDS
        for trace in [trace for trace, ended in self._ended.items() if ended < limit]:
            if self._remove_everywhere(trace):
                del self._ended[trace]

    def memory_of(self, build_id: str) -> int:
        """Return the bytes that a build has, if its steps together wanted more; else 0."""
        for group in self._groups(trace_of(build_id)):
            if _number(group / "memory.failcnt") or _event(group / "memory.events.local", "oom"):
                return self._limits.memory_bytes
        return 0

    def processes_of(self, build_id: str) -> int:
        """Return how many processes a build may have, if it had so many; else 0."""
        limit = self._limits.processes
        reached = bool(limit) and any(
            _number(group / "pids.peak") >= limit or _event(group / "pids.events", "max") > 0
            for group in self._groups(trace_of(build_id))
        )
        return limit if reached else 0

    def processes(self, path: str) -> list[int]:
        """Return the processes of a control group, by its path, and of those that it has made."""
        found: list[int] = []
        for root in self._roots():
            for group in each_group(root / path.lstrip("/")):
                with contextlib.suppress(OSError, ValueError):
                    found += processes_of(group)
        return list(dict.fromkeys(found))

    def _roots(self) -> list[Path]:
        if self._version_1:
            return [self._hierarchy / name for name in _CONTROLLERS]
        return [self._hierarchy]

    def _groups(self, name: str) -> list[Path]:
        return [root / self.place.lstrip("/") / name for root in self._roots()]

    def _make(self, name: str) -> None:
        if not self._version_1:
            # A group has only those controllers that all above it pass on.
            folder = self._hierarchy
            for part in ("", *Path(self.place.lstrip("/")).parts):
                folder /= part
                folder.mkdir(exist_ok=True)
                _write(folder / "cgroup.subtree_control", "+memory +cpu +pids")
        for group in self._groups(name):
            group.mkdir(parents=True, exist_ok=True)
        if self._version_1:
            self._bound_version_1(*self._groups(name))
        else:
            self._bound_version_2(*self._groups(name))

    def _bound_version_1(self, memory: Path, processors: Path, processes: Path) -> None:
        limits = self._limits
        if limits.memory_bytes:
            _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
            if (memory / "memory.memsw.limit_in_bytes").exists():
                _write(memory / "memory.memsw.limit_in_bytes", 2 * limits.memory_bytes)
        if limits.cpus:
            _write(processors / "cpu.cfs_period_us", PERIOD_MICROSECONDS)
            _write(processors / "cpu.cfs_quota_us", round(limits.cpus * PERIOD_MICROSECONDS))
        if limits.processes:
            _write(processes / "pids.max", limits.processes)

    def _bound_version_2(self, group: Path) -> None:
        limits = self._limits
        if limits.memory_bytes:
            _write(group / "memory.max", limits.memory_bytes)
            if (group / "memory.swap.max").exists():
                _write(group / "memory.swap.max", limits.memory_bytes)
        if limits.cpus:
            quota = round(limits.cpus * PERIOD_MICROSECONDS)
            _write(group / "cpu.max", f"{quota} {PERIOD_MICROSECONDS}")
        if limits.processes:
            _write(group / "pids.max", limits.processes)

    def _remove_all(self) -> None:
        self._ended.clear()
        self._remove_everywhere("")

    def _remove_everywhere(self, name: str) -> bool:
        """Remove a group, also where runc has made it for its steps; False where one still runs."""
        roots = [self._hierarchy]
        if self._version_1:
            # A controller can have several names.
            roots = list({folder.resolve() for folder in self._hierarchy.iterdir()})
        place = Path(self.place.lstrip("/"), name)
        removed = [_remove(root / place) for root in roots]
        return all(removed)


def remove_leftover_groups(projects: Path) -> None:
    """Remove the groups that a node which was killed has left; before any BuildKit runs.

    Args:
        projects: directory of the node's trust domains.
    """
    for folder in projects.glob("*"):
        BuildGroups(folder / "buildkit", BuildLimits())._remove_all()


def _remove(group: Path) -> bool:
    """Remove a group with all below it; False where something still runs."""
    removed = remove_groups(group)
    if not removed:
        _log.debug("build.group.busy", group=str(group))
    return removed


def _write(file: Path, value: int | str) -> None:
    # The kernel makes these files with their group: one that is missing must not be made by us.
    with file.open("r+") as opened:
        opened.write(str(value))


def _number(file: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return 0


def _event(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
