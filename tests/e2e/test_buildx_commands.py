"""`offload buildx` and `offload exec` as a person runs them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Member, Pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A gateway whose certificates are past half their life from the beginning."""
    lifetime = {"OFFLOAD_GATEWAY_MEMBER_CERTIFICATE_LIFETIME": "4m"}
    with Pool(1, environment=lifetime) as running:
        yield running


@pytest.fixture
def member(pool: Pool) -> Member:
    """Somebody with docker and buildx."""
    member = pool.member()
    plugins = member.home / ".docker" / "cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(TOOLS / "buildx")
    member.environment["PATH"] = f"{TOOLS}:{member.environment['PATH']}"
    return member


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def docker(member: Member, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *map(str, arguments)], env=member.environment, cwd=member.home,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def folder(member: Member, name: str = "offload") -> Path:
    return member.home / ".config" / "offload" / "buildx" / name


def create(member: Member) -> None:
    """Make a builder; its certificate is old from the beginning, and renewed in the background."""
    good(member.offload("buildx", "create"))
    deadline = time.monotonic() + WAIT_SECONDS
    while folder(member, "due").stat().st_mtime < time.time():
        assert time.monotonic() < deadline, "nothing was renewed in the background"
        time.sleep(0.05)
    with folder(member, "refresh.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def listed(member: Member) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(
        good(member.offload("buildx", "ls", "--format", "json"))
    )
    return rows


def test_a_builder_comes_is_used_and_goes(pool: Pool, member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "app")
    out = good(member.offload("buildx", "create", "--use", "--platform", "linux/amd64"))
    assert f'"offload" builds in the project "default" at {pool.address}' in out
    for path in folder(member).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(folder(member).stat().st_mode) == 0o700
    good(docker(member, "buildx", "build", context))
    assert member.builds()[0]["client"] == "buildx"
    (row,) = listed(member)
    assert row["current"] is True
    assert row["platforms"] == ["linux/amd64"]
    assert "offload*" in good(member.offload("buildx", "ls"))
    good(member.offload("buildx", "create"))  # again
    assert "offload" in good(member.offload("buildx", "rm", "offload"))
    assert listed(member) == []
    assert not folder(member).exists()
    assert docker(member, "buildx", "inspect", "offload").returncode != 0
    gone = member.offload("buildx", "rm", "offload")
    assert gone.returncode == 5
    assert 'no builder "offload"' in gone.stderr


def test_without_buildx_its_files_are_written(pool: Pool, member: Member, tmp_path: Path) -> None:
    path = member.environment["PATH"]
    member.environment["PATH"] = "/nowhere"
    done = member.offload("buildx", "create", "Team", "--use", "--platform", "linux/arm64/v8")
    assert "not installed" in done.stderr
    good(done)
    assert listed(member)[0]["current"] is True
    member.environment["PATH"] = path
    assert "linux/arm64" in good(docker(member, "buildx", "inspect", "team"))
    good(
        docker(member, "buildx", "build", "--platform", "linux/amd64", make_context(tmp_path / "a"))
    )
    member.environment["PATH"] = "/nowhere"
    good(member.offload("buildx", "rm", "team"))
    member.environment["PATH"] = path
    assert "team" not in good(docker(member, "buildx", "ls"))


def test_builders_of_others_are_left_alone(member: Member) -> None:
    good(docker(member, "buildx", "create", "--name", "mine", "--driver", "remote", "tcp://a:1"))
    done = member.offload("buildx", "create", "mine")
    assert done.returncode == 125
    assert "not ours" in done.stderr
    assert not folder(member, "mine").exists()
    assert "tcp://a:1" in good(docker(member, "buildx", "inspect", "mine"))


def test_names_and_platforms_that_buildx_refuses_are_refused(member: Member) -> None:
    for arguments in (("1st",), ("a/b",), ("x", "--platform", "linux")):
        done = member.offload("buildx", "create", *arguments)
        assert done.returncode == 1, done.stderr
        assert arguments[-1] in done.stderr


def test_variables_come_in_the_form_of_the_shell(member: Member) -> None:
    good(member.offload("buildx", "create"))
    assert good(member.offload("buildx", "env")) == "export BUILDX_BUILDER=offload\n"
    assert good(member.offload("buildx", "env", "--shell", "fish")).startswith("set -gx BUILDX_B")
    found = json.loads(good(member.offload("buildx", "env", "--shell", "json")))
    assert found == {"BUILDX_BUILDER": "offload"}


def test_certificates_are_renewed_by_refresh_and_behind_other_commands(member: Member) -> None:
    create(member)
    file = folder(member) / "client.pem"
    first = file.read_bytes()
    assert "offload: renewed" in good(member.offload("buildx", "refresh"))
    second = file.read_bytes()
    assert second != first
    assert good(member.offload("buildx", "refresh", "--quiet", "--force")) == ""
    third = file.read_bytes()
    # The moment has come.
    os.utime(folder(member, "due"), (1, 1))
    good(member.offload("builds"))
    deadline = time.monotonic() + WAIT_SECONDS
    while file.read_bytes() == third:
        assert time.monotonic() < deadline, "nothing was renewed in the background"
        time.sleep(0.05)
    assert folder(member, "due").stat().st_mtime > time.time()


def test_a_renewal_that_fails_is_told(pool: Pool, member: Member) -> None:
    create(member)
    before = (folder(member) / "client.pem").read_bytes()
    os.kill(pool.pid, signal.SIGSTOP)
    try:
        done = member.offload("buildx", "refresh", "--quiet")
    finally:
        os.kill(pool.pid, signal.SIGCONT)
    assert done.returncode == 7, done.stderr
    assert "could not be renewed" in done.stderr
    assert (folder(member) / "client.pem").read_bytes() == before


def test_certificates_follow_the_login(pool: Pool, member: Member) -> None:
    create(member)
    good(member.offload("logout"))
    assert not (folder(member) / "client.pem").exists()
    done = member.offload("buildx", "refresh", "--quiet")
    assert done.returncode == 4
    assert "not logged in" in done.stderr
    good(member.offload("login", f"https://{pool.address}", "--token", pool.admin_token))
    assert (folder(member) / "client.pem").exists()


def test_exec_leads_to_the_pool_and_leaves_nothing(member: Member, tmp_path: Path) -> None:
    script = (
        'echo $BUILDKIT_HOST && stat -c %a "${BUILDKIT_HOST#unix://}" && buildctl debug workers'
    )
    done = member.offload("exec", "--", "sh", "-c", script)
    address, mode, *workers = good(done).splitlines()
    assert mode == "600"
    assert any("linux/amd64" in line for line in workers)
    assert not os.path.exists(os.path.dirname(address.removeprefix("unix://")))  # noqa: PTH110, PTH120
    context = make_context(tmp_path / "app")
    (context / "large").write_bytes(os.urandom(1 << 20) * 40)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY large /\n")
    good(member.offload("exec", "docker", "buildx", "build", "-o", tmp_path / "out", context))
    assert (tmp_path / "out" / "large").read_bytes() == (context / "large").read_bytes()


def test_exec_has_the_exit_code_of_the_program(member: Member) -> None:
    assert member.offload("exec", "--", "sh", "-c", "exit 37").returncode == 37
    assert member.offload("exec", "--", "sh", "-c", "kill -9 $$").returncode == 137
    missing = member.offload("exec", "--", "no-such-program")
    assert missing.returncode == 5
    assert "no-such-program" in missing.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_exec_passes_signals_on(member: Member, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        member.command("offload", "exec", "--", "bash", "-c", script),
        env=member.environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"got {name}\n"
    assert process.wait(WAIT_SECONDS) == 9


def test_exec_says_why_the_pool_is_not_reached(member: Member) -> None:
    nobody = Member(member.home / "nobody", {})
    nobody.home.mkdir()
    done = nobody.offload("exec", "--gateway", "https://127.0.0.1:1", "--", "true")
    assert done.returncode == 4
    assert "not logged in" in done.stderr
    done = member.offload("exec", "--project", "nowhere", "--", "buildctl", "debug", "workers")
    assert done.returncode != 0
    assert "nowhere" in done.stderr
