"""What becomes of a container's specification on its way to runc."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from offload_builder.buildkit.daemon import inherited_environment
from offload_builder.buildkit.runcwrapper import (
    DROPPED,
    restrict_step,
    write_runc_wrapper,
)

TEXTS = ["CAP_NET_RAW", '"capabilities":{"bounding":["CAP_NET_RAW","x"]}', "CAP_NET_RAW", "$x `y`"]


def specification(*capabilities: str) -> str:
    sets = {name: list(capabilities) for name in ("bounding", "effective", "permitted")}
    process = {"args": TEXTS, "env": TEXTS, "capabilities": sets, "cwd": "/"}
    return json.dumps({"process": process, "root": {"path": "/r"}}, separators=(",", ":")) + "\n"


CAPABILITIES = [
    ("CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"),
    ("CAP_NET_RAW", "CAP_KILL"),
    ("CAP_CHOWN", "CAP_NET_RAW"),
    ("CAP_NET_RAW_X", "CAP_KILL"),
    ("CAP_NET_RAW",),
    (),
]


def less(capabilities: tuple[str, ...]) -> str:
    text = specification(*(name for name in capabilities if name != "CAP_NET_RAW"))
    return text.replace('{"process":{', '{"process":{"oomScoreAdj":500,')


@pytest.fixture
def runc(tmp_path: Path) -> Path:
    path = tmp_path / "it's runc"
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return path


def run(program: Path, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=10,
        env=os.environ | environment,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("capabilities", CAPABILITIES)
def test_step_loses_one_capability_and_goes_before_others_when_memory_is_out(
    tmp_path: Path, runc: Path, capabilities: tuple[str, ...]
) -> None:
    program = write_runc_wrapper(tmp_path, runc)
    bundle = tmp_path / "a bundle"
    bundle.mkdir()
    for file, arguments in (
        (bundle / "config.json", ["--log", "l", "run", "--bundle", str(bundle), "--keep", "id"]),
        (tmp_path / "process", ["exec", "--process", str(tmp_path / "process"), "id"]),
    ):
        file.write_text(specification(*capabilities))
        assert run(program, *arguments) == arguments
        assert file.read_text() == less(capabilities)


@pytest.mark.parametrize("capabilities", CAPABILITIES)
def test_node_changes_a_specification_as_the_program_does(
    tmp_path: Path, capabilities: tuple[str, ...]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(specification(*capabilities))
    assert restrict_step(file)
    assert file.read_text() == less(capabilities)
    file.write_text('{"process":{"args":["x"]}}')
    assert not restrict_step(file)


def test_only_the_gate_can_say_that_nothing_is_to_be_done(tmp_path: Path, runc: Path) -> None:
    file = tmp_path / "config.json"
    arguments = ("run", "--bundle", str(tmp_path), DROPPED)
    for gate, left in (
        ("", less(("CAP_NET_RAW",))),
        ("answer=go\n", less(("CAP_NET_RAW",))),
        (f"answer='{DROPPED} 1'\n", less(("CAP_NET_RAW",))),
        (f'answer="{DROPPED} $$"\n', specification("CAP_NET_RAW")),
    ):
        file.write_text(specification("CAP_NET_RAW"))
        run(write_runc_wrapper(tmp_path, runc, gate), *arguments, answer=DROPPED, word=DROPPED)
        assert file.read_text() == left


def test_step_does_not_run_when_its_specification_cannot_be_changed(
    tmp_path: Path, runc: Path
) -> None:
    program = write_runc_wrapper(tmp_path, runc)
    with pytest.raises(subprocess.CalledProcessError):
        run(program, "run", "--bundle", str(tmp_path / "gone"), "id")


def test_daemon_inherits_no_settings_and_no_keys() -> None:
    environment = {
        "PATH": "/bin", "OFFLOAD_NODE_S3_SECRET_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AZURE_CLIENT_SECRET": "x", "HTTPS_PROXY": "http://proxy",
    }  # fmt: skip
    assert set(inherited_environment(environment)) == {"PATH", "HTTPS_PROXY"}
