"""Control groups that a step has made below its own, in the kernel's real hierarchies."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from offload_builder.node.buildgroups import HIERARCHY, BuildGroups
from offload_builder.node.buildlimits import BuildLimits

LEVELS = 2500
"""More than Python's calls may nest, and with a path that is longer than the kernel takes."""


def dig(group: Path) -> int:
    """Make groups below one another; return a descriptor of the last one."""
    here = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(LEVELS):
        os.mkdir("g", dir_fd=here)
        below = os.open("g", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    return here


@pytest.fixture
def groups(tmp_path):
    made = BuildGroups(tmp_path / "buildkit", BuildLimits(processes=100))
    made.open()
    yield made
    made.close()


def test_groups_of_any_depth_are_looked_into_and_removed(groups):
    controller = "pids" if (HIERARCHY / "pids").is_dir() else ""
    place = HIERARCHY / controller / groups.place.lstrip("/")
    with groups.building("build") as trace, subprocess.Popen(["sleep", "100"]) as step:
        last = dig(place / trace)
        try:
            file = os.open("cgroup.procs", os.O_WRONLY, dir_fd=last)
            os.write(file, str(step.pid).encode())
            os.close(file)
            assert groups.processes(f"{groups.place}/{trace}") == [step.pid]
            groups.close()
            assert (place / trace).is_dir(), "a step runs there"
        finally:
            step.kill()
            os.close(last)
    groups.close()
    assert not place.exists()
