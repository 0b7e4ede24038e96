"""`offload-builder doctor`: what is missing, how to get it, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload_builder.cli import doctor as module
from offload_builder.cli.doctor import doctor, examine

NAMES = [
    "python", "root", "buildkitd", "runc", "setpriv", "iptables", "minio", "overlayfs", "cgroups",
    "disk",
]  # fmt: skip


def run(*arguments: str):
    return CliRunner().invoke(doctor, arguments)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OFFLOAD_MINIO", raising=False)
    monkeypatch.delenv("OFFLOAD_BUILDKITD", raising=False)
    monkeypatch.setattr("offload_builder.provider.process.tools_directory", lambda: tmp_path)


def test_every_part_is_looked_at_and_what_fails_has_a_remedy(tmp_path):
    checks = examine(tmp_path)
    assert [check.name for check in checks] == NAMES
    assert all(check.detail for check in checks)
    assert all(check.remedy for check in checks if not check.ok)


def test_missing_programs_are_named_with_a_remedy_and_exit_1(bare, tmp_path):
    result = run("--data", str(tmp_path))
    assert result.exit_code == 1
    for line in ("MISSING  buildkitd", "MISSING  runc", "absent   minio", "apt-get install runc"):
        assert line in result.output
    assert "Traceback" not in result.output


def test_json_has_the_same_facts(bare, tmp_path):
    result = run("--format", "json", "--data", str(tmp_path))
    found = {item["name"]: item for item in json.loads(result.output)}
    assert list(found) == NAMES
    assert result.exit_code == 1
    assert not found["runc"]["ok"]
    assert found["runc"]["required"]
    assert not found["minio"]["required"]


def test_absent_optional_parts_do_not_fail(monkeypatch, tmp_path):
    good = module.Check("a", ok=True, detail="there")
    absent = module.Check("b", ok=False, detail="not there", remedy="get it", required=False)
    monkeypatch.setattr(module, "examine", lambda _: [good, absent])
    result = run()
    assert result.exit_code == 0
    assert "-> get it" in result.output


def test_full_disk_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MINIMUM_FREE_BYTES", 1 << 60)
    disk = examine(tmp_path)[-1]
    assert (disk.ok, disk.required) == (False, True)


def test_data_directory_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (tmp_path / "a" / "b", Path("relative/path")):
        assert str(tmp_path) in examine(data)[-1].detail
