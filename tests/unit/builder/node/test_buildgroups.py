"""Control groups of builds in both versions of the kernel's hierarchy, as plain files.

What the kernel does with them is in `tests/integration/test_build_limits.py`, in the version that
the machine has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.outofmemory import OutOfMemory
from offload_builder.buildkit.stepgroups import OTHERS, trace_of
from offload_builder.node.buildgroups import BuildGroups
from offload_builder.node.buildlimits import BuildLimits
from offload_core.errors import ConfigError, NodeLostError

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = BuildLimits(memory_bytes=1 << 30, cpus=1.5, processes=100)
FILES = {
    "memory": {"memory.limit_in_bytes": "-1", "memory.memsw.limit_in_bytes": "-1",
               "memory.failcnt": "0"},
    "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1"},
    "pids": {"pids.max": "max", "pids.peak": "3", "pids.events": "max 0\n"},
    "": {"memory.max": "max", "memory.swap.max": "max", "cpu.max": "max 100000",
         "pids.max": "max", "memory.events.local": "low 0\nmax 4\noom 0\noom_kill 0\n",
         "pids.peak": "3", "pids.events": "max 0\n"},
}  # fmt: skip


class Kernel:
    """The hierarchy, where the kernel has put its files into the groups that will be made."""

    def __init__(self, root: Path, *, version: int) -> None:
        self.root = root
        self.controllers = ("memory", "cpu", "pids") if version == 1 else ("",)
        for controller in self.controllers:
            (root / controller).mkdir(parents=True, exist_ok=True)
            (root / controller / "cgroup.procs").write_text("")
            (root / controller / "cgroup.subtree_control").write_text("")
        self.groups = BuildGroups(root / "owner", LIMITS, root)

    def fill(self, name: str) -> None:
        """Do as the kernel when a group is made."""
        for controller in self.controllers:
            folder = self.root / controller / self.groups.place.lstrip("/")
            for group in (folder.parent, folder, folder / name):
                group.mkdir(parents=True, exist_ok=True)
                (group / "cgroup.subtree_control").write_text("")
            for file, text in FILES[controller].items():
                (folder / name / file).write_text(text)

    def read(self, controller: str, name: str, file: str) -> str:
        folder = controller if controller in self.controllers else ""
        return (self.root / folder / self.groups.place.lstrip("/") / name / file).read_text()

    def write(self, controller: str, name: str, file: str, text: str) -> None:
        folder = controller if controller in self.controllers else ""
        path = self.root / folder / self.groups.place.lstrip("/") / name / file
        assert path.exists()
        path.write_text(text)


def test_version_1_bounds_a_group_in_each_hierarchy(tmp_path: Path) -> None:
    kernel, trace = Kernel(tmp_path, version=1), trace_of("b1")
    kernel.fill(trace)
    with kernel.groups.building("b1") as found:
        assert found == trace
        assert kernel.groups.is_open(trace)
        assert kernel.read("memory", trace, "memory.limit_in_bytes").startswith(f"{1 << 30}")
        assert kernel.read("memory", trace, "memory.memsw.limit_in_bytes").startswith(f"{2 << 30}")
        assert kernel.read("cpu", trace, "cpu.cfs_quota_us").startswith("150000")
        assert kernel.read("pids", trace, "pids.max").startswith("100")
        assert (kernel.groups.memory_of("b1"), kernel.groups.processes_of("b1")) == (0, 0)
        kernel.write("memory", trace, "memory.failcnt", "7\n")
        kernel.write("pids", trace, "pids.peak", "100\n")
        assert (kernel.groups.memory_of("b1"), kernel.groups.processes_of("b1")) == (1 << 30, 100)
    assert not kernel.groups.is_open(trace)


def test_version_2_passes_controllers_on_and_bounds_the_group(tmp_path: Path) -> None:
    kernel, trace = Kernel(tmp_path, version=2), trace_of("b1")
    kernel.fill(trace)
    with kernel.groups.building("b1"):
        folder = tmp_path / kernel.groups.place.lstrip("/")
        for group in (tmp_path, folder.parent, folder):
            assert (group / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
        # Processes below it need none: runc asks for what it uses.
        assert (folder / trace / "cgroup.subtree_control").read_text() == ""
        assert kernel.read("", trace, "memory.max").startswith(f"{1 << 30}")
        assert kernel.read("", trace, "memory.swap.max").startswith(f"{1 << 30}")
        assert kernel.read("", trace, "cpu.max") == "150000 100000"
        assert kernel.read("", trace, "pids.max").startswith("100")
        # At its bound, but nothing was refused: the kernel has made room.
        assert kernel.groups.memory_of("b1") == 0
        kernel.write("", trace, "memory.events.local", "max 9\noom 1\noom_kill 1\n")
        kernel.write("", trace, "pids.events", "max 2\n")
        assert (kernel.groups.memory_of("b1"), kernel.groups.processes_of("b1")) == (1 << 30, 100)


@pytest.mark.parametrize("version", [1, 2])
def test_bounds_that_the_kernel_does_not_take_stop_the_build(tmp_path: Path, version: int) -> None:
    kernel = Kernel(tmp_path, version=version)
    # Without the files of the kernel nothing would be bounded.
    with pytest.raises(NodeLostError, match="cannot be bounded"), kernel.groups.building("b1"):
        pass
    with pytest.raises(ConfigError, match="builds cannot be bounded"):
        kernel.groups.open()


def test_without_bounds_nothing_is_made(tmp_path: Path) -> None:
    groups = BuildGroups(tmp_path / "owner", BuildLimits(), tmp_path / "none")
    groups.open()
    with groups.building("b1") as trace:
        assert trace == ""
    groups.sweep()
    groups.close()
    assert groups.shell == ""
    assert not (tmp_path / "none").exists()
    assert OTHERS not in groups.place


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        (["memory=2GiB", "pids=50"], BuildLimits(2 << 30, 1.5, 50, 0)),
        (["cpus=0", "disk=1GiB"], BuildLimits(1 << 30, 0.0, 100, 1 << 30)),
        ([], LIMITS),
    ],
)
def test_project_replaces_single_bounds(values: list[str], limits: BuildLimits) -> None:
    found = LIMITS.with_values(values)
    found.check()
    assert found == limits


@pytest.mark.parametrize(
    "text", ["memory", "memory=much", "cpu=2", "pids=1.5", "cpus=nan-ish", "disk=-1", "=4"]
)
def test_bound_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="bound"):
        LIMITS.with_values([text]).check()


@pytest.mark.parametrize(
    "limits",
    [
        BuildLimits(memory_bytes=1), BuildLimits(processes=3), BuildLimits(cpus=0.001),
        BuildLimits(disk_bytes=5), BuildLimits(processes=-1), BuildLimits(cpus=float("nan")),
        BuildLimits(cpus=float("inf")),
    ],
)  # fmt: skip
def test_bound_with_which_nothing_is_built_is_refused(limits: BuildLimits) -> None:
    with pytest.raises(ConfigError, match="or 0"):
        limits.check()


@pytest.mark.parametrize(
    ("own", "peak", "build", "blamed"),
    [
        (0, 50, 96, True),
        (200, 50, 96, True),
        (96, 50, 96, True),
        # Its own bound was met, or it is not known that it was not.
        (64, 64, 96, False),
        (64, 60, 96, False),
        (64, 0, 96, False),
        # It had half of what it may have, and others the rest.
        (64, 32, 96, True),
        (64, 64, 0, False),
        (0, 64, 0, False),
    ],
)
def test_bound_of_the_build_is_blamed_where_that_of_the_step_was_not_met(
    own: int, peak: int, build: int, blamed: bool
) -> None:
    step = OutOfMemory(own << 20, peak << 20)
    assert step.within(build << 20) is blamed
    assert "limit of 96MiB" in step.describe_build(96 << 20)
