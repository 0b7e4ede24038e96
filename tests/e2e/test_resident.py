"""The resident helper behaves as a command in a process of its own, whatever happens to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.helper import HelperUser, Terminal
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member


@pytest.fixture
def user(member: Member, tmp_path: Path) -> Iterator[HelperUser]:
    """A member with a running helper."""
    with HelperUser(member) as found:
        first = found.member.build(make_context(tmp_path / "first"))
        assert first.returncode == 0, first.stderr
        found.wait()
        yield found


def wait_canceled(member: Member) -> None:
    newest = member.wait_state("canceled")
    assert newest["state"] == "canceled"


def test_build_in_the_helper_gives_what_a_build_of_its_own_process_gives(
    user: HelperUser, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN echo same > /same\n")
    alone = user.member.build("-t", "x", "--metadata-file", "a.json", context, OFFLOAD_RESIDENT="0")
    helped = user.build("-t", "x", "--metadata-file", "b.json", context)
    assert alone.returncode == helped.returncode == 0, helped.stderr
    first, second = (
        json.loads((user.member.home / name).read_text()) for name in ("a.json", "b.json")
    )
    assert first["containerimage.digest"] == second["containerimage.digest"]
    steps = [re.findall(r"(?m)^#\d+ (\[\d/\d\] .*)$", r.stderr) for r in (alone, helped)]
    assert steps[0] == steps[1] != []
    assert helped.stdout == alone.stdout == ""


def test_errors_have_the_same_sentences_and_exit_codes(user: HelperUser, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo why >&2; exit 9\n")
    for arguments in (["--nope", context], [], ["-t", "A", context], ["nowhere"], ["-qh"]):
        alone = user.member.build(*arguments, OFFLOAD_RESIDENT="0")
        helped = user.build(*arguments)
        assert (alone.returncode, alone.stderr, alone.stdout) == (
            helped.returncode, helped.stderr, helped.stdout,
        )  # fmt: skip
    failed = user.build(context)
    assert failed.returncode == 1
    assert "exit code: 9" in failed.stderr


def test_every_command_brings_its_own_environment_and_directory(
    user: HelperUser, pool: Pool, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "ARG WHO\nRUN echo for-$WHO\n")
    result = user.build("--build-arg", "WHO", context, WHO="ann")
    assert "for-ann" in result.stderr, result.stderr
    result = user.build("--build-arg", "WHO", ".", cwd=context, WHO="ben")
    assert "for-ben" in result.stderr, result.stderr
    result = user.build(context, OFFLOAD_CONFIG_DIR=str(tmp_path / "empty"))
    assert result.returncode == 3
    token = pool.create_token("visitor", "ci")
    result = user.build(
        context, OFFLOAD_CONFIG_DIR=str(tmp_path / "empty"), OFFLOAD_TOKEN=token,
        OFFLOAD_GATEWAY=pool.address,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert user.member.builds()[0]["member"] == "visitor"


def cancel_newest(member: Member) -> None:
    """End a build that goes on without its command."""
    newest = member.builds()[0]
    assert newest["state"] == "running"
    assert member.offload("cancel", newest["build_id"]).returncode == 0
    wait_canceled(member)


def test_progress_on_a_terminal_and_ctrl_c(user: HelperUser, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo begun && sleep 600\n")
    command = user.member.command("offload-build", context)
    environment = {**user.member.environment, "TERM": "xterm"}
    with Terminal(command, environment, tmp_path) as terminal:
        terminal.wait_for(b"begun")
        assert b"\x1b[" in terminal.output
        began = time.monotonic()
        terminal.type(b"\x03")
        terminal.wait_for(b"press d to leave")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert time.monotonic() - began < 2.0
        assert terminal.output.rstrip().endswith(b"ERROR: canceled")
        assert terminal.output.rindex(b"\x1b[?25h") > terminal.output.rindex(b"\x1b[?25l")
    wait_canceled(user.member)
    assert user.build(make_context(tmp_path / "next")).returncode == 0


def test_killed_helper_ends_the_build_with_a_sentence(user: HelperUser, tmp_path: Path) -> None:
    building = user.member.start(make_context(tmp_path / "c", "RUN echo begun && sleep 600\n"))
    wait_for_text(building, "begun")
    (pid,) = user.pids()
    os.kill(pid, signal.SIGKILL)
    _, errors = building.communicate(timeout=20)
    assert building.returncode == 70
    assert errors.splitlines()[-1].startswith("ERROR: the resident helper")
    cancel_newest(user.member)
    # Its socket is still there; the next build does not trip over it, and starts a new helper.
    context = make_context(tmp_path / "next")
    assert user.member.build(context).returncode == 0
    deadline = time.monotonic() + 20
    while not user.pids() or user.member.build(context).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert pid not in user.pids()


def test_killed_command_leaves_its_build(user: HelperUser, tmp_path: Path) -> None:
    building = user.member.start(make_context(tmp_path / "c", "RUN echo begun && sleep 600\n"))
    wait_for_text(building, "begun")
    building.kill()
    building.communicate(timeout=20)
    time.sleep(1.0)
    cancel_newest(user.member)
    assert user.build(make_context(tmp_path / "next")).returncode == 0


def test_second_interrupt_ends_the_command_at_once(user: HelperUser, tmp_path: Path) -> None:
    building = user.member.start(make_context(tmp_path / "c", "RUN echo begun && sleep 600\n"))
    wait_for_text(building, "begun")
    (pid,) = user.pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        building.send_signal(signal.SIGINT)
        time.sleep(0.2)
        building.send_signal(signal.SIGINT)
        building.wait(timeout=5)
    finally:
        os.kill(pid, signal.SIGCONT)
    building.communicate(timeout=20)
    assert building.returncode in (130, -signal.SIGINT)
    wait_canceled(user.member)


def test_helper_that_does_not_answer_is_not_waited_for(user: HelperUser, tmp_path: Path) -> None:
    (pid,) = user.pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        result = user.member.build(make_context(tmp_path / "c"))
        assert result.returncode == 0, result.stderr
        assert time.monotonic() - began < 8
    finally:
        os.kill(pid, signal.SIGCONT)
    assert user.build(make_context(tmp_path / "next")).returncode == 0


def test_restarts_of_gateway_and_node_in_between_are_not_noticed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with Pool(1, "--listen", f"127.0.0.1:{port}") as pool, HelperUser(pool.member()) as user:
        context = make_context(tmp_path / "c", "RUN echo one\n")
        assert user.member.build(context).returncode == 0
        user.wait()
        assert user.build(context).returncode == 0
        os.kill(pool.node_pid("node-1"), signal.SIGKILL)
        result = user.build(context)
        assert result.returncode == 0, result.stderr
        pool.stop()
        pool.start()
        result = user.build(context)
        assert result.returncode == 0, result.stderr


def test_many_builds_leave_no_descriptors_behind(user: HelperUser, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo again\n")
    (pid,) = user.pids()

    def descriptors() -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    for _ in range(3):
        assert user.build("-o", f"type=tar,dest={tmp_path}/x.tar", context).returncode == 0
    before = descriptors()
    for _ in range(12):
        assert user.build("-o", f"type=tar,dest={tmp_path}/x.tar", context).returncode == 0
    assert descriptors() <= before + 2


def test_changed_code_ends_the_helper_after_the_build_that_runs(tmp_path: Path) -> None:
    # Without a pool: what is asked for is wrong in every process, and the sentence is the same.
    package = tmp_path / "site" / "offload_client"
    root = Path(__file__).resolve().parents[2]
    package.parent.mkdir()
    subprocess.run(["cp", "-r", root / "client" / "offload_client", package], check=True)
    runtime = tmp_path / "r"
    (runtime / "offload").mkdir(parents=True, mode=0o700)
    (runtime / "offload").chmod(0o700)
    environment = {
        **os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_RUNTIME_DIR": str(runtime),
        "OFFLOAD_RESIDENT": "1", "OFFLOAD_CONFIG_DIR": str(tmp_path / "none"),
    }  # fmt: skip
    code = (
        "import sys; from offload_client.resident.thin import *; import os;"
        "p = socket_path(os.environ); print(p, flush=True);"
        "sys.stdin.readline(); print(run_in_helper(['--nope', '.']))"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert asking.stdout is not None
    path = asking.stdout.readline().strip()
    helper = subprocess.Popen(
        [sys.executable, "-m", "offload_client.resident.server", path], env=environment
    )
    deadline = time.monotonic() + 20
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = subprocess.run(
        [sys.executable, "-c", code], env=environment, input="\n", capture_output=True, text=True,
        timeout=20,
    )  # fmt: skip
    assert again.stdout.splitlines()[-1] == "125"
    assert "unknown flag: --nope" in again.stderr
    os.utime(package / "invocation.py")
    out, _ = asking.communicate("\n", timeout=20)
    assert out.strip() == "None"
    assert helper.wait(20) == 0
    assert not Path(path).exists()
