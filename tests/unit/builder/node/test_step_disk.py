"""What counts as written by a step, seen in files and processes of this machine.

Steps that write too much are in `tests/integration/test_build_limits.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from offload_builder.node.buildgroups import BuildGroups
from offload_builder.node.buildlimits import BuildLimits
from offload_builder.node.diskwatch import DiskNotes, DiskWatch, Watched
from offload_builder.node.stepdisk import (
    StepDisk,
    WritingStep,
    tree_bytes,
    unlinked_bytes,
    written_together,
)

MIB = 1 << 20


class Steps:
    """The bundle of a step, and its control group as plain files."""

    def __init__(self, root: Path) -> None:
        self.hierarchy = root / "cgroup"
        (self.hierarchy / "memory").mkdir(parents=True)
        (self.hierarchy / "memory/cgroup.procs").write_text("")
        self.groups = BuildGroups(root / "bk", BuildLimits(disk_bytes=MIB), self.hierarchy)
        self.disk = StepDisk(root / "bk", os.getpid, self.groups)
        self.bundle = root / "bk/runc-overlayfs/executor/one"
        self.bundle.mkdir(parents=True)
        self.cache = root / "bk/mounts/cache"
        self.cache.mkdir(parents=True)

    def specify(self, group: str) -> None:
        mount = {"destination": "/cache", "source": str(self.cache), "options": ["rbind"]}
        text = {"process": {"args": ["sh"]}, "linux": {"cgroupsPath": group}, "mounts": [mount]}
        (self.bundle / "config.json").write_text(json.dumps(text))

    def begin(self, group: str) -> None:
        folder = self.hierarchy / "memory" / group.lstrip("/")
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text(f"{os.getpid()}\n")


def test_step_is_watched_from_its_first_process_on_in_the_group_that_it_has_then(tmp_path):
    steps = Steps(tmp_path)
    # As BuildKit writes it, and the program in runc's place has not changed it yet.
    steps.specify("/buildkit/one")
    assert steps.disk.look() == []
    group = f"{steps.groups.place}/{'a' * 32}/buildkit/one"
    steps.specify(group)
    # While the step waits, its cache mount is filled from the shared store.
    (steps.cache / "restored").write_bytes(os.urandom(2 * MIB))
    assert steps.disk.look() == []
    steps.begin(group)
    (step,) = steps.disk.look()
    assert (step.group, step.trace) == (group, "a" * 32)
    (steps.cache / "own").write_bytes(os.urandom(MIB))
    os.sync()
    assert MIB <= steps.disk.measure(step) < 2 * MIB


def test_deleted_file_that_processes_have_inherited_counts_once(tmp_path):
    path = tmp_path / "file"
    before = unlinked_bytes([os.getpid()])
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
        path.unlink()
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]
        )
        with child:
            found = unlinked_bytes([os.getpid(), child.pid])
    assert MIB <= found - before < 2 * MIB


def test_files_in_memory_are_none_on_the_disk():
    before = unlinked_bytes([os.getpid()])
    memory = os.memfd_create("test")
    path = Path("/dev/shm") / f"offload-{os.getpid()}"
    shared = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    for descriptor in (memory, shared):
        os.write(descriptor, os.urandom(MIB))
    found = unlinked_bytes([os.getpid()])
    os.close(memory)
    os.close(shared)
    assert found == before


def test_growth_of_a_cache_mount_that_steps_had_at_once_counts_once():
    cache = Path("/cache")
    first = WritingStep(("a",), "", None, {cache: 0}, {cache: 6 * MIB}, written=7 * MIB)
    second = WritingStep(("b",), "", None, {cache: MIB}, {cache: 6 * MIB}, written=5 * MIB)
    assert written_together([first, second]) == 7 * MIB
    # One after the other: what another build wrote in between is not theirs.
    later = WritingStep(("c",), "", None, {cache: 20 * MIB}, {cache: 22 * MIB}, written=2 * MIB)
    assert written_together([first, later]) == 9 * MIB


def test_cache_mount_that_could_not_be_counted_before_is_not_held_against_a_step(
    tmp_path, monkeypatch
):
    steps = Steps(tmp_path)
    group = f"{steps.groups.place}/{'a' * 32}/buildkit/one"
    steps.specify(group)
    steps.begin(group)
    (steps.cache / "much").write_bytes(os.urandom(MIB))
    monkeypatch.setattr("offload_builder.node.stepdisk._MEASURE_SECONDS", -1.0)
    assert tree_bytes(steps.cache) == (0, False)
    (step,) = steps.disk.look()
    monkeypatch.undo()
    assert steps.disk.measure(step) == 0


def test_builds_of_a_buildkit_that_is_closed_are_forgotten_while_others_go_on(tmp_path):
    first, second = Steps(tmp_path / "1"), Steps(tmp_path / "2")
    watched = [
        Watched(steps.disk, MIB, DiskNotes(), busy=lambda: True) for steps in (first, second)
    ]
    watch = DiskWatch(tmp_path, 0, lambda: watched)
    watch._look(watched)
    assert len(watch._counted) == 2
    watch._look(watched[1:])
    assert list(watch._counted) == [second.disk]
