"""What a node's process has after it has given up what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.apparmor import check_profile
from offload_builder.node.privileges import KEPT
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import ctypes, json, os, resource, subprocess, sys
from pathlib import Path
from offload_builder.node.privileges import give_up_privileges
give_up_privileges(Path(sys.argv[1]))
def status(text):
    return dict(line.split(":\\t", 1) for line in text.splitlines() if ":\\t" in line)
child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True)
print(json.dumps({
    "own": status(Path("/proc/self/status").read_text()),
    "child": status(child.stdout),
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "mode": oct(Path(sys.argv[1]).stat().st_mode & 0o777),
}))
"""


def test_agent_and_its_children_keep_only_what_is_needed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, data], capture_output=True, text=True, check=True,
        timeout=30,
    )  # fmt: skip
    found = json.loads(done.stdout)
    allowed = sum(1 << number for number in KEPT.values())
    for whose in ("own", "child"):
        for kind in ("CapBnd", "CapPrm", "CapEff", "CapInh"):
            assert not int(found[whose][kind], 16) & ~allowed, (whose, kind)
        assert found[whose]["Umask"] == "0077"
        # Steps inherit it, and sudo in a step needs this.
        assert found[whose]["NoNewPrivs"] == "0"
    assert int(found["own"]["CapEff"], 16) & 1 << KEPT["sys_admin"]
    assert found["dumpable"] == 0
    assert found["core"][0] == 0
    assert found["mode"] == "0o700"


def test_profile_of_steps_must_be_one_that_the_kernel_has(tmp_path: Path) -> None:
    check_profile("")
    with pytest.raises(ConfigError, match="has no AppArmor"):
        check_profile("docker-default", tmp_path)
    enabled = tmp_path / "sys/module/apparmor/parameters/enabled"
    profiles = tmp_path / "sys/kernel/security/apparmor/profiles"
    for file, text in ((enabled, "Y\n"), (profiles, "docker-default (enforce)\nother (x)\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    check_profile("docker-default", tmp_path)
    with pytest.raises(ConfigError, match="is not loaded"):
        check_profile("docker", tmp_path)
    enabled.write_text("N\n")
    with pytest.raises(ConfigError, match="has no AppArmor"):
        check_profile("docker-default", tmp_path)
