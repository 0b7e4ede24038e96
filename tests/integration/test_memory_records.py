"""What the program in runc's place notes of a step's memory, in both versions of control groups.

The hierarchy is one of plain files with the kernel's content, in a mount namespace of its own: a
machine has its memory controller in one version only, and a test cannot move it. What the kernel
itself does is in `test_step_rights`, in the version that the machine has.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.outofmemory import FOLDER, OutOfMemory, find_out_of_memory
from offload_builder.buildkit.runcwrapper import write_runc_wrapper

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STEP = "s0me1d"
COMMAND = ["/bin/sh", "-c", "make all"]
MESSAGE = 'process "/bin/sh -c make all" did not complete successfully: exit code: 2'
MIB = 1 << 20
OLD = {
    "memory.stat": "cache 0\nrss 4096\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    "memory.limit_in_bytes": f"{64 * MIB}\n",
    "memory.max_usage_in_bytes": f"{63 * MIB}\n",
}
NEW = {
    "memory.stat": "anon 4096\nfile 0\nkernel 0\n",
    "memory.events": "low 0\nhigh 0\nmax 118\noom 1\noom_kill 1\noom_group_kill 0\n",
    "memory.max": f"{64 * MIB}\n",
    "memory.peak": f"{64 * MIB}\n",
}
NO_PEAK = {name: text for name, text in NEW.items() if name != "memory.peak"}
"""Of kernels before 5.19."""
NO_LIMIT = {**NEW, "memory.max": "max\n"}
UNHARMED = {**NEW, "memory.events": NEW["memory.events"].replace(" 1\n", " 0\n")}
SCRIPT = (
    'mount -t tmpfs none /sys/fs/cgroup && cp -a "$1"/. /sys/fs/cgroup && exec "$2" delete "$3"'
)


@pytest.mark.parametrize(
    ("hierarchy", "parent", "files", "found"),
    [
        ("memory", "", OLD, OutOfMemory(64 * MIB, 63 * MIB)),
        ("memory", "/offload/team/a", OLD, OutOfMemory(64 * MIB, 63 * MIB)),
        ("", "", NEW, OutOfMemory(64 * MIB, 64 * MIB)),
        ("", "/offload/team/a", NEW, OutOfMemory(64 * MIB, 64 * MIB)),
        ("", "", NO_PEAK, OutOfMemory(64 * MIB, 0)),
        ("", "", NO_LIMIT, OutOfMemory(0, 64 * MIB)),
        ("", "", UNHARMED, None),
        ("", "", {}, None),
        ("memory", "", {}, None),
    ],
)
def test_step_of_which_a_process_was_killed_is_noted(
    tmp_path: Path, hierarchy: str, parent: str, files: Mapping[str, str], found: OutOfMemory | None
) -> None:
    groups = tmp_path / "groups"
    group = groups / hierarchy / parent.strip("/") / "buildkit" / STEP
    group.mkdir(parents=True)
    # Neither a neighbour that was killed nor the whole machine is this step.
    other = group.parent / "other"
    other.mkdir()
    killed = OLD if hierarchy else NEW
    for folder, content in ((group, files), (other, killed), (groups / hierarchy, killed)):
        for name, text in content.items():
            (folder / name).write_text(text)
    bundle = tmp_path / "root/runc-overlayfs/executor" / STEP
    bundle.mkdir(parents=True)
    specification = {
        "process": {"args": COMMAND, "env": ["A=cgroupsPath"], "cwd": "/"},
        "linux": {"cgroupsPath": f"{parent}/buildkit/{STEP}", "namespaces": []},
    }
    if files:
        text = json.dumps(specification, separators=(",", ":"))
        (bundle / "config.json").write_text(text)
    runc = tmp_path / "runc"
    runc.write_text("#!/bin/sh\necho deleted\n")
    runc.chmod(0o755)
    program = write_runc_wrapper(tmp_path / "root", runc)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", groups, program, STEP],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("deleted\n", "")
    assert find_out_of_memory(tmp_path / "root", MESSAGE, 0) == found
    assert [path.name for path in (tmp_path / "root" / FOLDER).iterdir()] == [STEP] * bool(found)
