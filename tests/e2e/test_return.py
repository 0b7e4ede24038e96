"""Leaving a build and coming back to it: nothing is lost, whatever happens to the client."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import wait_for_text
from tests.fixtures.relayedpool import RelayedPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fixtures.pool import Member

LINES = 40
PRINTING = f"""\
RUN i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; sleep 0.03; done; echo x > /made
RUN echo after > /more
"""
REPRODUCIBLE = (
    "--no-cache",
    "--build-arg=SOURCE_DATE_EPOCH=1700000000",
    "--output=type=image,rewrite-timestamp=true",
)
POINTS = 20


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    with RelayedPool() as running:
        yield running


@pytest.fixture
def member(relayed: RelayedPool) -> Iterator[Member]:
    relayed.relay.reset()
    yield relayed.member()
    relayed.relay.reset()


def plain_log(member: Member, build_id: str) -> dict[str, list[str]]:
    """Return the replayed plain log by step, without numbers and times."""
    done = member.offload("logs", build_id)
    assert done.returncode == 0, done.stderr
    names: dict[str, str] = {}
    steps: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        match = re.match(r"(#\d+) (.*)", line)
        if match is None:
            continue
        number, text = match.groups()
        name = names.setdefault(number, text)
        text = re.sub(r"^\d+\.\d+ ", "", text)
        text = re.sub(r" \d+\.\d+s\b", "", text)
        if text.startswith("transferring ") and not text.endswith(" done"):
            continue  # a look at a counter, when there was time for it
        steps.setdefault(name, []).append(text)
    # A step that is taken up again, after others, is announced anew; when BuildKit's own steps are
    # told of their end and of their counters is a matter of time as well.
    return {
        name: sorted({*lines})
        if name.startswith(("[internal]", "exporting"))
        else [text for at, text in enumerate(lines) if not at or text not in (name, "...")]
        for name, lines in steps.items()
    }


def rest_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a command; return its exit code and what it shows from now on."""
    with process:
        assert process.stderr is not None
        shown = process.stderr.read()
    return process.returncode, shown


class Terminal:
    """A build at a terminal of its own, with somebody who types."""

    def __init__(self, member: Member, *arguments: str | Path, **environment: str) -> None:
        self.pid, self._file = pty.fork()
        if not self.pid:
            command = member.command("offload-build", "--progress", "plain", *arguments)
            os.execve(command[0], command, {**member.environment, **environment})
        self.shown = ""

    def wait_for(self, text: str, timeout: float = 40.0) -> None:
        """Read until a text comes."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            assert time.monotonic() < deadline and self._read(), self.shown
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        """Type."""
        os.write(self._file, text.encode())

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        while self._read():
            pass
        os.close(self._file)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        if not select.select([self._file], [], [], 20)[0]:
            return True
        try:
            data = os.read(self._file, 1 << 16)
        except OSError:
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


def ended(member: Member, build_id: str, timeout: float = 40.0) -> dict[str, object]:
    deadline = time.monotonic() + timeout
    while True:
        build = next(item for item in member.builds() if item["build_id"] == build_id)
        if build["completed_at"]:
            return build
        assert time.monotonic() < deadline, build
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_killed_clients_change_nothing(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    for _ in range(2):  # once the node has the context, it is not transferred any more
        undisturbed = member.build(*REPRODUCIBLE, context)
        assert undisturbed.returncode == 0, undisturbed.stderr
    first = member.builds()[0]
    expected = plain_log(member, first["build_id"])
    printed = [text for texts in expected.values() for text in texts if text.startswith("line ")]
    assert printed == [f"line {number}" for number in range(1, LINES + 1)]
    dice = random.Random(20)
    for point in range(POINTS):
        client = member.start(*REPRODUCIBLE, context)
        try:
            wait_for_text(client, " line 1")
            time.sleep(dice.uniform(0.0, 1.6))
        finally:
            os.killpg(client.pid, signal.SIGKILL)
            client.communicate()
        build_id = member.builds()[0]["build_id"]
        assert build_id != first["build_id"]
        build = ended(member, build_id)
        assert build["state"] == "succeeded", point
        assert build["image_digest"] == first["image_digest"], point
        assert plain_log(member, build_id) == expected, point


def test_cut_connection_loses_no_line(relayed: RelayedPool, member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    client = member.start("--no-cache", "--tag", "cut", context)
    seen = wait_for_text(client, " line 3")
    relayed.relay.cut()
    code, rest = rest_of(client)
    shown = seen + rest
    assert code == 0, shown
    found = re.findall(r" line (\d+)$", shown, re.MULTILINE)
    assert found == [str(number) for number in range(1, LINES + 1)]
    assert shown.count("the connection was lost; coming back ...") == 1
    assert len(member.builds()) >= 1
    assert member.builds()[0]["state"] == "succeeded"


def test_detach_attach_inspect(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    left = member.build("--detach", "--no-cache", "--tag", "away", context)
    assert left.returncode == 0, left.stderr
    assert re.fullmatch(r"\S+\n", left.stdout)
    build_id = left.stdout.strip()
    assert member.builds()[0]["state"] == "running"
    back = member.offload("attach", "--progress", "plain", build_id[:-4])
    assert back.returncode == 0, back.stderr
    found = re.findall(r" line (\d+)$", back.stderr, re.MULTILINE)
    assert found == [str(number) for number in range(1, LINES + 1)]
    again = member.offload("attach", "--progress", "plain", build_id)
    assert again.returncode == 0, again.stderr
    assert re.findall(r" line (\d+)$", again.stderr, re.MULTILINE) == found
    ended(member, build_id)
    text = member.offload("inspect", build_id).stdout
    assert re.search(rf"^Build: +{build_id}$", text, re.MULTILINE), text
    assert re.search(r"^Build Steps: +\d+ \(\d+% cached\)$", text, re.MULTILINE), text
    values = json.loads(member.offload("inspect", build_id, "--format", "json").stdout)
    assert values["state"] == "succeeded"
    assert any("while" in step["name"] and step["seconds"] > 0.5 for step in values["steps"])
    assert values["log_bytes"] >= sum(len(f"line {n}\n") for n in range(1, LINES + 1))


def test_attach_has_the_exit_code_of_the_build(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN sleep 1; echo the-cause; exit 9\n")
    left = member.build("--detach", "--no-cache", context)
    assert left.returncode == 0, left.stderr
    build_id = left.stdout.strip()
    for _ in range(2):
        back = member.offload("attach", "--progress", "plain", build_id)
        assert back.returncode == 1, back.stderr
        assert "exit code: 9" in back.stderr
        assert "the-cause" in back.stderr
        ended(member, build_id)


def test_ctrl_c_leaves_an_attachment_and_the_build_goes_on(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    left = member.build("--detach", "--no-cache", context)
    build_id = left.stdout.strip()
    looking = subprocess.Popen(
        member.command("offload", "attach", "--progress", "plain", build_id),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=member.environment,
    )  # fmt: skip
    wait_for_text(looking, " line 2")
    looking.send_signal(signal.SIGINT)
    code, shown = rest_of(looking)
    assert code == 130
    assert "the build goes on" in shown
    assert ended(member, build_id)["state"] == "succeeded"


def test_ctrl_c_without_a_terminal_cancels(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    client = member.start("--no-cache", context)
    wait_for_text(client, " line 2")
    client.send_signal(signal.SIGINT)
    code, shown = rest_of(client)
    assert code == 130, shown
    assert ended(member, member.builds()[0]["build_id"])["state"] == "canceled"


@pytest.fixture(params=["process", "helper"])
def terminal(
    request: pytest.FixtureRequest, member: Member, tmp_path: Path
) -> Iterator[Callable[..., Terminal]]:
    """Start builds at a terminal, in a process of their own or in the resident helper."""
    runtime = Path(tempfile.mkdtemp(prefix="ort-"))
    environment = {"XDG_RUNTIME_DIR": str(runtime)}
    environment["OFFLOAD_RESIDENT"] = "1" if request.param == "helper" else "0"
    if request.param == "helper":
        member.environment |= environment
        warm = make_context(tmp_path / "warm")
        assert member.build(warm).returncode == 0
        deadline = time.monotonic() + 20
        while not list(runtime.glob("offload/*.sock")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield lambda *arguments: Terminal(member, *arguments, **environment)
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(runtime).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(runtime, ignore_errors=True)


def test_ctrl_c_at_a_terminal_asks(
    terminal: Callable[..., Terminal], member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    person = terminal("--no-cache", "--tag", "asked", context)
    person.wait_for(" line 2")
    person.type("\x03")
    person.wait_for("press d to leave the build running")
    person.type("\n")
    person.wait_for("the build goes on")
    person.type("\x03")
    person.wait_for("press d to leave the build running")
    person.type("d")
    person.wait_for("follow it with: offload attach")
    assert person.end() == 130
    assert ended(member, member.builds()[0]["build_id"])["state"] == "succeeded"


@pytest.mark.parametrize("answer", ["c", "\x03"])
def test_second_ctrl_c_at_a_terminal_cancels(
    terminal: Callable[..., Terminal], member: Member, tmp_path: Path, answer: str
) -> None:
    context = make_context(tmp_path / "c", PRINTING)
    person = terminal("--no-cache", context)
    person.wait_for(" line 2")
    person.type("\x03")
    person.wait_for("press d to leave the build running")
    person.type(answer)
    assert person.end() == 130
    assert ended(member, member.builds()[0]["build_id"])["state"] == "canceled"
