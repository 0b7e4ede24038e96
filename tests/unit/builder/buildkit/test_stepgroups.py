"""Which control group a step is put into, by what its specification says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.buildkit.runcwrapper import write_runc_wrapper
from offload_builder.buildkit.stepgroups import groups_shell, trace_headers, trace_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLACE = "/offload-builds/abc"
OURS, THEIRS = trace_of("one"), trace_of("two")


def variable(trace: str) -> str:
    return f"TRACEPARENT=00-{trace}-{trace[:16]}-00"


def written(groups: Path, bundle: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program with another place for the hierarchies of the kernel."""
    runc = folder / "runc-real"
    runc.write_text("#!/bin/sh\necho ran\n")
    runc.chmod(0o755)
    shell = groups_shell(PLACE).replace("/sys/fs/cgroup", shlex.quote(os.fspath(groups)))
    program = write_runc_wrapper(folder, runc, shell)
    return subprocess.run(
        [program, "run", "--bundle", bundle, "s1"], capture_output=True, text=True, timeout=10,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("hierarchy", ["memory", ""])
@pytest.mark.parametrize(
    ("environment", "path", "group", "left"),
    [
        (["A=1", variable(OURS)], "/buildkit/s1", f"{OURS}/buildkit/s1", ["A=1"]),
        # A build names the group of another one, in every way that it can.
        ([variable(THEIRS), variable(OURS)], "/buildkit/s1", f"{OURS}/buildkit/s1",
         [variable(THEIRS)]),
        (["A=,\\"+variable(THEIRS), 'B=x","' + variable(THEIRS) + '"', variable(OURS)],
         "/buildkit/s1", f"{OURS}/buildkit/s1",
         ["A=,\\"+variable(THEIRS), 'B=x","' + variable(THEIRS) + '"']),
        # With a device, variables of its own follow.
        ([variable(OURS), "DEVICE=1"], "/buildkit/s1", f"{OURS}/buildkit/s1", ["DEVICE=1"]),
        # Of no build that is known.
        (["A=1", variable("0" * 32)], "/buildkit/s1", "others/buildkit/s1", ["A=1"]),
        (["A=1"], "/buildkit/s1", "others/buildkit/s1", ["A=1"]),
        (["TRACEPARENT=00-others"], "/buildkit/s1", "others/buildkit/s1", None),
        ([variable(OURS)], "/offload/team/buildkit/s1", f"{OURS}/offload/team/buildkit/s1", []),
        # Ways out of the group.
        ([variable(OURS)], "/../../../buildkit/s1", f"{OURS}/bundle", []),
        ([variable(OURS)], "system.slice:x:s1", f"{OURS}/bundle", []),
        ([variable(OURS)], "/a b/buildkit/s1", f"{OURS}/bundle", []),
        ([variable(OURS)], '/a","x":"/b', f"{OURS}/bundle", []),
        ([variable(OURS)], "/a#&\\1", f"{OURS}/bundle", []),
    ],
)  # fmt: skip
def test_step_goes_below_the_group_of_its_build(
    tmp_path: Path, hierarchy: str, environment: Sequence[str], path: str, group: str, left: Any
) -> None:
    groups = tmp_path / "groups"
    for name in (OURS, THEIRS, "others"):
        (groups / hierarchy / PLACE[1:] / name).mkdir(parents=True)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    process = {
        "args": ["x", variable(THEIRS)],
        "env": ["PATH=/bin", *environment],
        "capabilities": {},
    }
    before = {"process": process, "linux": {"cgroupsPath": path, "resources": {}}}
    (bundle / "config.json").write_text(json.dumps(before, separators=(",", ":")))
    done = written(groups, bundle, tmp_path)
    assert done.stdout == "ran\n", done.stderr
    after = json.loads((bundle / "config.json").read_text())
    assert after["linux"]["cgroupsPath"] == f"{PLACE}/{group}"
    kept = list(environment) if left is None else left
    assert after["process"]["env"] == ["PATH=/bin", *kept]
    assert after["process"]["args"] == process["args"]


def test_step_does_not_run_where_no_group_bounds_it(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text(
        '{"process":{"env":[],"capabilities":{}},"linux":{"cgroupsPath":"/buildkit/s1"}}'
    )
    done = written(tmp_path / "none", bundle, tmp_path)
    assert done.returncode == 1
    assert "cannot be put into the control group of its build" in done.stderr
    # Nor where it does not say which one it wants.
    (tmp_path / "groups" / PLACE[1:] / "others").mkdir(parents=True)
    text = '{"process":{"env":["A=1","%s"],"capabilities":{}},"linux":{}}'
    for config in (text % variable(OURS), text % "B=1"):
        (bundle / "config.json").write_text(config)
        done = written(tmp_path / "groups", bundle, tmp_path)
        assert (done.returncode, done.stdout) == (1, "")


def test_call_names_the_group_of_its_build_and_asks_for_no_spans() -> None:
    assert trace_headers("") == []
    assert trace_headers(OURS) == [("traceparent", f"00-{OURS}-{OURS[:16]}-00")]
