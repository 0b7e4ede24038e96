"""What becomes of the resources in a step's specification before it runs."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.buildkit.runcwrapper import write_runc_wrapper
from offload_builder.buildkit.stepbounds import bounds_shell

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
DEVICES = [{"allow": False, "access": "rwm"}]
# What a step says of itself must not be taken for its resources.
TEXTS = ['"resources":{"memory":{"limit":1},"x":{"limit":2}', "}", '"memory":{"limit":9}']
BOUNDS = {"memory_bytes": 32 * MIB, "max_memory_bytes": 64 * MIB, "cpus": 0.5, "max_cpus": 2.0}


def resources(folder: Path, asked: dict[str, Any], **bounds: float) -> dict[str, Any]:
    """Return the resources of a step that asks for some."""
    runc = folder / "real"
    runc.write_text("#!/bin/sh\n")
    runc.chmod(0o755)
    program = write_runc_wrapper(folder, runc, bounds_shell(**{**BOUNDS, **bounds}))  # type: ignore[arg-type]
    bundle = folder / "bundle"
    bundle.mkdir()
    content = {
        "process": {"args": TEXTS, "env": TEXTS, "capabilities": {"bounding": ["CAP_KILL"]}},
        "linux": {"resources": {"devices": DEVICES, **asked}, "namespaces": [{"type": "pid"}]},
    }
    config = bundle / "config.json"
    config.write_text(json.dumps(content, separators=(",", ":")))
    subprocess.run([program, "run", "--bundle", bundle, "x"], check=True, timeout=10)
    found = json.loads(config.read_text())
    assert found["process"].pop("oomScoreAdj") > 0
    assert found["process"] == content["process"]
    assert found["linux"]["namespaces"] == [{"type": "pid"}]
    made: dict[str, Any] = found["linux"]["resources"]
    assert made.pop("devices") == DEVICES
    return made


DEFAULT_MEMORY = {"limit": 32 * MIB}
DEFAULT_CPU = {"quota": 50_000, "period": 100_000}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"memory": {"limit": 65 * MIB}},
        {"memory": {"limit": -1}},
        {"memory": {"limit": 1 << 62}},
        {"memory": {"limit": 64 * MIB, "swap": -1}},
        {"memory": {"limit": 64 * MIB, "swap": 200 * MIB}},
        {"memory": {"swap": 20 * MIB}, "cpu": {"shares": 5}},
        {"cpu": {"quota": 200_001, "period": 100_000}},
        {"cpu": {"quota": -1, "period": 100_000}},
        {"cpu": {"quota": 50_000}},
        {"cpu": {"shares": 2, "quota": 9_000, "period": 1_000, "cpus": "0-1,3"}},
    ],
)
def test_what_asks_for_nothing_or_too_much_gets_the_default(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    assert resources(tmp_path, asked) == {"memory": DEFAULT_MEMORY, "cpu": DEFAULT_CPU}


def test_what_is_within_the_bounds_stays(tmp_path: Path) -> None:
    asked = {
        "memory": {"limit": 64 * MIB, "swap": 128 * MIB},
        "cpu": {"shares": 7, "quota": 200_000, "period": 100_000, "cpus": "0-1,3"},
    }
    assert resources(tmp_path, asked) == asked


def test_a_default_alone_bounds_only_who_asks_for_nothing(tmp_path: Path) -> None:
    only = {"max_memory_bytes": 0, "max_cpus": 0}
    asked = {"memory": {"limit": 1 << 40, "swap": -1}}
    assert resources(tmp_path, asked, **only) == {**asked, "cpu": DEFAULT_CPU}


def test_without_bounds_nothing_is_done() -> None:
    assert bounds_shell(memory_bytes=0, max_memory_bytes=0, cpus=0, max_cpus=0) == ""


def test_other_commands_have_no_specification(tmp_path: Path) -> None:
    runc = tmp_path / "real"
    runc.write_text('#!/bin/sh\necho "$@"\n')
    runc.chmod(0o755)
    program = write_runc_wrapper(tmp_path, runc, bounds_shell(**BOUNDS))  # type: ignore[arg-type]
    done = subprocess.run([program, "state", "x"], capture_output=True, check=True, timeout=10)
    assert done.stdout == b"state x\n"


def test_a_step_whose_bounds_cannot_be_set_does_not_run(tmp_path: Path) -> None:
    runc = tmp_path / "real"
    runc.write_text("#!/bin/sh\necho ran\n")
    runc.chmod(0o755)
    program = write_runc_wrapper(tmp_path, runc, bounds_shell(**BOUNDS))  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [program, "run", "--bundle", tmp_path, "x"], capture_output=True, check=False, timeout=10
    )
    assert (done.returncode, done.stdout) == (1, b"")
