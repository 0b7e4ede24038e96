"""Mounts of a real process, with names that the kernel writes in another way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from offload_builder.mountinfo import read_mounts


def test_our_own_mounts_are_read():
    (root,) = [mount for mount in read_mounts() if mount.point == "/"][-1:]
    assert root.device == Path("/").stat().st_dev
    (proc,) = [mount for mount in read_mounts(os.getpid()) if mount.point == "/proc"][-1:]
    assert proc.kind == "proc"


def test_a_process_that_is_gone_is_an_error():
    with pytest.raises(OSError, match="mountinfo"):
        read_mounts(1 << 22)


@pytest.mark.parametrize(
    "name", ["a b", "tab\tnew\nline", "back\\slash,comma", "end\u2028\x0b", "ü"]
)
def test_names_of_any_kind_are_read(tmp_path, name):
    for part in ("upper", "work", "lower", "at"):
        (tmp_path / name / part).mkdir(parents=True)
    shell = (
        'mount -t tmpfs tmpfs upper && mkdir upper/u upper/w && cd "$0" && '
        "mount -t overlay overlay -o lowerdir=lower,upperdir=upper/u,workdir=upper/w at && "
        "echo ready && read _"
    )
    command = ["unshare", "--mount", "sh", "-ec", shell, "."]
    with subprocess.Popen(
        command, cwd=tmp_path / name, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = {mount.point: mount for mount in read_mounts(process.pid)}
        process.communicate(b"\n")
    assert found[str(tmp_path / name / "upper")].kind == "tmpfs"
    overlay = found[str(tmp_path / name / "at")]
    assert overlay.kind == "overlay"
    assert overlay.options["upperdir"].endswith("upper/u")
