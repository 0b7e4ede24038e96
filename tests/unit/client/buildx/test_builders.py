"""Builders of this user, and when their certificates are due."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from offload_client.buildx import builders
from offload_client.buildx.renewal import alone, hand_over, take_back
from offload_client.cli import entry
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import ConfigError, InvalidValueError, NotFoundError
from tests.fixtures.memberidentity import identity

if TYPE_CHECKING:
    from pathlib import Path

HOUR = 3600.0


def invocation(tmp_path: Path) -> Invocation:
    environment = {"HOME": str(tmp_path), "OFFLOAD_CONFIG_DIR": str(tmp_path / "c")}
    return Invocation((), tmp_path, environment, 0, text_stream(1), text_stream(2))


def test_builders_are_found_again(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    assert builders.list_builders(run) == []
    builder = builders.Builder("pool", "gw:7443", "shop", ("linux/amd64",), "n")
    builders.save_builder(run, builder, identity(-HOUR, HOUR))
    assert builders.list_builders(run) == [builder]
    assert builder.server_name == "shop.buildkit.offload"
    files = {
        path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "c/buildx/pool").iterdir()
    }
    assert files == {"builder.json": 0o600, "ca.pem": 0o600, "client.pem": 0o600}
    builders.forget_builder(run, "pool")
    with pytest.raises(NotFoundError):
        builders.find_builder(run, "pool")
    builders.forget_builder(run, "pool")


def test_the_moment_of_the_first_renewal_is_written_down(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    for name, end in (("late", 10 * HOUR), ("early", 4 * HOUR)):
        builder = builders.Builder(name, "gw:7443", "shop")
        builders.save_builder(run, builder, identity(0, end))
    builders.note_due(run)
    due = tmp_path / "c" / "buildx" / "due"
    assert due.stat().st_mtime == pytest.approx(time.time() + 2 * HOUR, abs=30)
    builders.note_due(run, not_before=time.time() + 3 * HOUR)
    assert due.stat().st_mtime == pytest.approx(time.time() + 3 * HOUR, abs=30)
    assert take_back(run, "gw:7443") == ["early", "late"]
    assert not due.exists()
    hand_over(run, "other:1", identity(0, HOUR))
    assert builders.certificate_times(run, builder) is None
    hand_over(run, "gw:7443", identity(0, HOUR))
    assert due.exists()


def test_a_certificate_is_written_only_when_it_is_another_one(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builder = builders.Builder("pool", "gw:7443", "shop")
    first = identity(0, HOUR)
    builders.save_builder(run, builder, first)
    assert not builders.write_identity(run, builder, first)
    assert builders.write_identity(run, builder, identity(0, HOUR))


def test_half_of_a_life_counts() -> None:
    now = time.time()
    assert builders.is_half_over(now - 3, now + 1)
    assert not builders.is_half_over(now - 1, now + 3)


def test_names_are_those_that_buildx_takes() -> None:
    assert builders.check_name("Pool.a-b_1") == "pool.a-b_1"
    for name in ("", "1a", "a b", "a/b", "../x"):
        with pytest.raises(InvalidValueError):
            builders.check_name(name)


def test_a_damaged_builder_is_named(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builders.save_builder(run, builders.Builder("pool", "gw:1", "p"), identity(0, HOUR))
    (tmp_path / "c/buildx/pool/builder.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"builder\.json"):
        builders.list_builders(run)


def test_one_process_at_a_time_changes_certificates(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    with alone(run) as mine:
        assert not mine  # nothing is there to be changed
    (tmp_path / "c" / "buildx").mkdir(parents=True)
    with alone(run) as mine, alone(run, wait_seconds=0.1) as other:
        assert (mine, other) == (True, False)


def test_the_quick_look_finds_the_same_directory(monkeypatch, tmp_path: Path) -> None:
    for variables in (
        {"HOME": str(tmp_path)},
        {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "x")},
        {"HOME": str(tmp_path), "OFFLOAD_CONFIG_DIR": "~/mine"},
        {"HOME": str(tmp_path), "OFFLOAD_CONFIG_DIR": str(tmp_path / "y")},
    ):
        for name in ("HOME", "XDG_CONFIG_HOME", "OFFLOAD_CONFIG_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run = Invocation.of_process(())
        assert entry._config_folder() == str(run.config_dir())
