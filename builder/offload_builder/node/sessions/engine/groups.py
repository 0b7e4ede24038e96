"""Control groups of engines: one with the limits, and below it one that is the engine's own.

The engine may make groups in its own one, and sees nothing above it. What bounds it is in the
upper one, which only this machine's root can write to.

Sources: the kernel's admin-guide/cgroup-v2 (delegation) and cgroup-v1/{cpusets,devices,memory};
scheduler/sched-bwc.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from offload_builder.buildkit.stepbounds import PERIOD_MICROSECONDS
from offload_builder.node.buildgroups import HIERARCHY
from offload_builder.node.grouptrees import each_group, processes_of, remove_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_builder.node.sessions.contract import EngineLimits

ROOT = "offload-sessions"
OWN = "engine"
_DELEGATED = (
    "", "cgroup.procs", "tasks", "cgroup.threads", "cgroup.subtree_control", "memory.oom.group"
)  # fmt: skip
_CONTROLLERS_2 = ("cpuset", "cpu", "io", "memory", "pids")
_DEVICES = (
    "c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm",
    "c 5:0 rwm", "c 5:1 rwm", "c 5:2 rwm", "c 136:* rwm",
)  # fmt: skip
"""What docker allows its containers; in an engine nobody can make nodes of others anyway."""
_NAMES = ("cpuset.cpus", "cpuset.mems")
_GONE_SECONDS = 5.0
_MOST_GROUPS = 4096
_TRIES = 5


class EngineGroups:
    """The groups of one engine. Its methods block.

    Args:
        owner: directory of all engines of the node.
        engine_id: of the engine.
        hierarchy: where the kernel shows control groups.
    """

    def __init__(self, owner: Path, engine_id: str, hierarchy: Path = HIERARCHY) -> None:
        self._hierarchy = hierarchy
        self._place = Path(_place(owner), engine_id)
        self.unified = not (hierarchy / "memory" / "cgroup.procs").exists()

    def make(self, id_base: int, devices: Sequence[tuple[str, int, int]]) -> None:
        """Make them.

        Args:
            id_base: the user that the lower ones are for.
            devices: that may be used: "c" or "b", major, minor.

        Raises:
            OSError: the kernel does not.
        """
        for root in _roots(self._hierarchy):
            for left in reversed(range(_TRIES)):
                try:
                    self._make(root, id_base, devices)
                    break
                except FileNotFoundError:
                    # Another node of this machine has just removed a directory that both need.
                    if not left:
                        raise

    def _make(self, root: Path, id_base: int, devices: Sequence[tuple[str, int, int]]) -> None:
        if self.unified:
            _pass_on(root, self._place)
        group = root
        for part in (*self._place.parts, OWN):
            group /= part
            group.mkdir(exist_ok=True)
            for name in _NAMES:
                file = group / name
                if not self.unified and file.exists() and not file.read_text().strip():
                    _write(file, (group.parent / name).read_text().strip())
            if part == self._place.name and (group / "devices.deny").exists():
                _write(group / "devices.deny", "a")
                for rule in (*_DEVICES, *(f"{k} {a}:{b} rwm" for k, a, b in devices)):
                    _write(group / "devices.allow", rule)
        if self.unified:
            (group / "init").mkdir(exist_ok=True)
        for folder in (group, group / "init"):
            for name in _DELEGATED:
                if (folder / name).exists():
                    os.chown(folder / name, id_base, id_base)

    def limit(self, limits: EngineLimits) -> None:
        """Put limits into force for everything that is in them.

        Raises:
            OSError: the kernel does not.
        """
        quota = max(1, limits.cpu_millis) * PERIOD_MICROSECONDS // 1000
        if self.unified:
            group = self._hierarchy / self._place
            _write(group / "cpu.max", f"{quota} {PERIOD_MICROSECONDS}")
            _write(group / "memory.max", limits.memory_bytes)
            if (group / "memory.swap.max").exists():
                _write(group / "memory.swap.max", 0)
            _write(group / "pids.max", limits.pids)
            # A machine has 65,535 groups with memory, for everybody; version 1 knows no such bound.
            _write(group / "cgroup.max.descendants", _MOST_GROUPS)
            return
        _write(self._upper("cpu") / "cpu.cfs_period_us", PERIOD_MICROSECONDS)
        _write(self._upper("cpu") / "cpu.cfs_quota_us", quota)
        memory = self._upper("memory")
        both = memory / "memory.memsw.limit_in_bytes"
        if both.exists():
            # It is never below the other one.
            _write(both, -1)
        _write(memory / "memory.limit_in_bytes", limits.memory_bytes)
        if both.exists():
            _write(both, limits.memory_bytes)
        _write(self._upper("pids") / "pids.max", limits.pids)

    def own(self) -> list[tuple[str, str]]:
        """Return the groups that the engine gets: its name for the hierarchy, and where it is.

        A hierarchy without a name is one that the engine is in and does not see.
        """
        if self.unified:
            return [("", str(self._hierarchy / self._place / OWN))]
        return [
            ("" if root.name == "unified" else root.name, str(root / self._place / OWN))
            for root in _roots(self._hierarchy)
        ]

    def links(self) -> list[tuple[str, str]]:
        """Return further names of hierarchies: "cpu" may be the same as "cpu,cpuacct"."""
        if self.unified:
            return []
        return [
            (path.name, os.fspath(path.readlink()))
            for path in self._hierarchy.iterdir()
            if path.is_symlink()
        ]

    def kill(self) -> bool:
        """Kill what runs in them, frozen or not; return whether something did."""
        return _kill(root / self._place for root in _roots(self._hierarchy))

    def remove(self) -> bool:
        """Remove them once nothing runs in them; return whether they are gone."""
        return _remove([root / self._place for root in _roots(self._hierarchy)])

    def _upper(self, controller: str) -> Path:
        return self._hierarchy / controller / self._place


def sweep_groups(owner: Path, hierarchy: Path = HIERARCHY) -> bool:
    """End and remove the groups of all engines of a node; return whether they are gone. Blocks."""
    groups = [root / _place(owner) for root in _roots(hierarchy)]
    if not any(group.exists() for group in groups):
        return True
    _kill(groups)
    removed = _remove(groups)
    for group in groups:
        with contextlib.suppress(OSError):
            # Other nodes of this machine may have some.
            group.parent.rmdir()
    return removed


def _place(owner: Path) -> str:
    key = hashlib.sha256(os.fsencode(owner.absolute())).hexdigest()[:16]
    return f"{ROOT}/{key}"


def _roots(hierarchy: Path) -> list[Path]:
    if (hierarchy / "cgroup.procs").exists():
        return [hierarchy]
    return sorted(
        path
        for path in hierarchy.iterdir()
        if not path.is_symlink() and (path / "cgroup.procs").exists()
    )


def _pass_on(root: Path, place: Path) -> None:
    """Have every group above an engine's own pass on the controllers that there are (version 2)."""
    folder = root
    for part in ("", *place.parts):
        folder /= part
        folder.mkdir(exist_ok=True)
        have = (folder / "cgroup.controllers").read_text().split()
        wanted = " ".join(f"+{name}" for name in _CONTROLLERS_2 if name in have)
        if wanted:
            _write(folder / "cgroup.subtree_control", wanted)


def _kill(groups: Iterable[Path]) -> bool:
    found = False
    for root in groups:
        for group in each_group(root):
            with contextlib.suppress(OSError, ValueError):
                for pid in processes_of(group):
                    found = True
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                _thaw(group)
    return found


def _thaw(group: int) -> None:
    """Let the processes of a group go on: those that version 1 has frozen do not even die."""
    with contextlib.suppress(OSError):
        file = os.open("freezer.state", os.O_WRONLY | os.O_CLOEXEC, dir_fd=group)
        try:
            os.write(file, b"THAWED")
        finally:
            os.close(file)


def _remove(groups: Sequence[Path]) -> bool:
    deadline = time.monotonic() + _GONE_SECONDS
    left = list(groups)
    while True:
        left = [group for group in left if not remove_groups(group)]
        if not left or time.monotonic() > deadline:
            break
        # What was killed leaves its groups a little later.
        time.sleep(0.01)
    return not left


def _write(file: Path, value: int | str) -> None:
    # The kernel makes these files with their group: one that is missing must not be made by us.
    with file.open("r+") as opened:
        opened.write(str(value))
