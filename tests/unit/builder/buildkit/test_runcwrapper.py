"""What becomes of a container's specification on its way to runc."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from offload_builder.buildkit.daemon import inherited_environment
from offload_builder.buildkit.runcwrapper import write_runc_wrapper

TEXTS = ["CAP_NET_RAW", '"capabilities":{"bounding":["CAP_NET_RAW","x"]}', "CAP_NET_RAW", "$x `y`"]


def specification(*capabilities: str) -> str:
    sets = {name: list(capabilities) for name in ("bounding", "effective", "permitted")}
    process = {"args": TEXTS, "env": TEXTS, "capabilities": sets, "cwd": "/"}
    return json.dumps({"process": process, "root": {"path": "/r"}}, separators=(",", ":")) + "\n"


@pytest.mark.parametrize(
    "capabilities",
    [
        ("CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"),
        ("CAP_NET_RAW", "CAP_KILL"),
        ("CAP_CHOWN", "CAP_NET_RAW"),
        ("CAP_NET_RAW_X", "CAP_KILL"),
        (),
    ],
)
def test_step_loses_one_capability_and_nothing_else(
    tmp_path: Path, capabilities: tuple[str, ...]
) -> None:
    runc = tmp_path / "it's runc"
    runc.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    runc.chmod(0o755)
    program = write_runc_wrapper(tmp_path, runc)
    bundle = tmp_path / "a bundle"
    bundle.mkdir()
    for file, arguments in (
        (bundle / "config.json", ["--log", "l", "run", "--bundle", str(bundle), "--keep", "id"]),
        (tmp_path / "process", ["exec", "--process", str(tmp_path / "process"), "id"]),
    ):
        file.write_text(specification(*capabilities))
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        assert done.stdout.splitlines() == arguments
        left = [name for name in capabilities if name != "CAP_NET_RAW"]
        assert file.read_text() == specification(*left)


def test_daemon_inherits_no_settings_and_no_keys() -> None:
    environment = {
        "PATH": "/bin", "OFFLOAD_NODE_S3_SECRET_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AZURE_CLIENT_SECRET": "x", "HTTPS_PROXY": "http://proxy",
    }  # fmt: skip
    assert set(inherited_environment(environment)) == {"PATH", "HTTPS_PROXY"}
