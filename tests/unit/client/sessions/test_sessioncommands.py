"""Commands for sessions, without a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from offload_client.cli.sessionimages import image_row, with_images
from offload_client.cli.sessionrows import fill_template
from offload_client.cli.sessionstart import Starting
from offload_client.cli.sessionstop import Stopping, question
from offload_client.dockercli.plugin import hook_answer, is_builder_alias
from offload_client.invocation import Invocation, text_stream
from offload_client.sessions.attaching import Attachments
from offload_client.sessions.diagnosis import write_bundle
from offload_client.sessions.faststatus import fast_status
from offload_client.sessions.gatewaycalls import choose
from offload_client.sessions.helperprocess import helper_environment
from offload_client.sessions.records import (
    SessionRecord,
    engine_socket,
    helper_socket,
    prepare_sockets,
    remove_record,
    session_directory,
    write_record,
)
from offload_client.settings import Settings
from offload_core.errors import ConfigError, NotFoundError, UsageError
from offload_proto.v1.builds_service_pb2 import Build, BuildState
from offload_proto.v1.sessions_service_pb2 import OpenSessionResponse, Session, SessionSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload_client.connections import Connections
    from offload_client.sessions.gatewaycalls import SessionCalls


@pytest.fixture
def invocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invocation]:
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield Invocation((), tmp_path, {"HOME": str(tmp_path)}, 0, text_stream(1), text_stream(2))
    # Sockets of long paths are elsewhere.
    for directory in (tmp_path / ".local/state/offload/sessions").glob("[!.]*"):
        remove_record(directory)


def remember(invocation: Invocation, name: str, **more: Any) -> Path:
    directory = session_directory(invocation, name)
    context = f"docker-offload-{name}"
    record = SessionRecord(f"id-{name}", name, "p", "g:1", context, 1.0, "", "ann")
    write_record(directory, record)
    return directory


@contextmanager
def helper(directory: Path, **answer: Any) -> Iterator[None]:
    """Answer as the helper of a session does."""
    prepare_sockets(directory)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(helper_socket(directory)))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(4096):
                    connection.sendall(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        helper_socket(directory).unlink()


def test_status_of_sessions_asks_their_helpers(
    invocation: Invocation, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = remember(invocation, "web")
    activity = {"running_containers": 2, "pauses_at": 4e9, "sent_bytes": 5, "received_bytes": 7}
    with helper(directory, state="running", activity=activity, warnings=["a", "b"], ports=[]):
        assert fast_status(["-s", "--format=json"]) == 0
        (told,) = json.loads(capfd.readouterr().out)
        assert (told["state"], told["idle"], told["warning"]) == ("running", True, "b")
        assert (told["bytes_to_session"], told["bytes_from_session"]) == (7, 5)
        assert fast_status(["-s", "web"]) == 0
        assert "Running (Idle)" in capfd.readouterr().out
    assert fast_status(["-s", "web", "-f", "json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["helper"] == "not running"
    assert fast_status(["-s", "nosuch"]) == 5
    assert fast_status(["-s", "NO SUCH"]) == 1


@pytest.mark.parametrize("words", [[], ["-f", "json"], ["-s", "--gateway", "x"], ["-sw"]])
def test_other_forms_of_status_are_left_to_the_command(words: list[str]) -> None:
    assert fast_status(words) is None


def test_status_of_sessions_imports_nothing_that_takes_long(invocation: Invocation) -> None:
    script = (
        "import sys\n"
        "from offload_client.cli.entry import offload_main\n"
        "sys.argv = ['offload', 'status', '-s']\n"
        "try:\n    offload_main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "HOME": str(invocation.home())},
    )  # fmt: skip
    heavy = {"asyncio", "click", "google", "grpc", "offload_proto", "ssl", "structlog"}
    assert not heavy & set(done.stdout.split())


def test_command_without_a_name_means_the_session_in_use(invocation: Invocation) -> None:
    local = Attachments(invocation)
    with pytest.raises(NotFoundError):
        local.chosen(None)
    remember(invocation, "one")
    assert local.chosen(None).name == "one"
    remember(invocation, "two")
    with pytest.raises(UsageError, match="one, two"):
        local.chosen(None)
    local.contexts.select("docker-offload-two")
    assert local.chosen(None).name == "two"
    assert local.chosen("id-one").name == "one"
    with pytest.raises(NotFoundError):
        local.chosen("three")


def test_two_commands_do_not_work_on_one_session(invocation: Invocation) -> None:
    local = Attachments(invocation)
    with (
        local.alone("web"),
        pytest.raises(ConfigError, match="another command"),
        Attachments(invocation).alone("web"),
    ):
        pass
    with local.alone("web"):
        pass


def test_question_says_what_is_lost(invocation: Invocation) -> None:
    remember(invocation, "one")
    remember(invocation, "two")
    records = Attachments(invocation).records()
    assert question(records[:1], {"one": 2}) == (
        "WARNING! Its containers (2 of them running), images and volumes will be removed.\n"
        'Stop the session "one"?'
    )
    assert 'Stop the sessions "one", "two"?' in question(records, {})


def test_session_is_found_by_id_name_and_beginning() -> None:
    def session(session_id: str, name: str, owner: str) -> Session:
        return Session(session_id=session_id, spec=SessionSpec(name=name), owner=owner)

    all_ = [
        session("aa11", "default", "ann"), session("ab22", "default", "ben"),
        session("ab33", "web", "ben"), session("cc44", "web", "eve"),
    ]  # fmt: skip
    assert choose(all_, "default", "ann").session_id == "aa11"
    assert choose(all_, "ab3", "ann").session_id == "ab33"
    assert choose(all_, "cc44", "ann").owner == "eve"
    for text in ("web", "ab"):
        with pytest.raises(UsageError, match="give an id"):
            choose(all_, text, "ann")
    with pytest.raises(NotFoundError):
        choose(all_, "", "ann")


def test_template_has_the_columns_of_docker_ps() -> None:
    row = {"ID": "a1", "State": "Running"}
    assert fill_template(r"{{.ID}}\t{{ .State }}", row) == "a1\tRunning"
    assert json.loads(fill_template("{{json .}}", row)) == row
    assert fill_template("{{json .ID}}", row) == '"a1"'
    for wrong in ("{{.Nope}}", "{{range .}}", "{{"):
        with pytest.raises(UsageError):
            fill_template(wrong, row)


def test_helper_gets_what_it_logs_in_with_and_no_other_secret() -> None:
    environment = {
        "HOME": "/h", "PATH": "/b", "OFFLOAD_TOKEN": "t", "OFFLOAD_CONFIG_DIR": "/c",
        "DOCKER_CONFIG": "/d", "AWS_SECRET_ACCESS_KEY": "x", "GITHUB_TOKEN": "y",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "z", "CI_JOB_TOKEN": "v", "CI_JOB_ID": "1",
        "XDG_STATE_HOME": "state",
    }  # fmt: skip
    kept = helper_environment(environment, Path("/work"))
    assert set(environment) - set(kept) == {
        "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "CI_JOB_TOKEN",
    }  # fmt: skip
    # It works in another directory.
    assert kept["XDG_STATE_HOME"] == "/work/state"
    assert kept["DOCKER_CONFIG"] == "/d"


@pytest.mark.parametrize(
    ("attributes", "alias"),
    [
        ("docker.cli.cobra.command_path=docker%20builder", True),
        ("a=b,docker.cli.cobra.command_path=docker%20builder", True),
        ("docker.cli.cobra.command_path=docker%20offload", False),
        ("", False),
    ],
)
def test_stop_of_builders_is_not_taken_for_that_of_sessions(attributes: str, alias: bool) -> None:
    assert is_builder_alias({"OTEL_RESOURCE_ATTRIBUTES": attributes}) is alias


def test_docker_hears_of_a_session_in_use_that_ends_soon(invocation: Invocation) -> None:
    directory = remember(invocation, "web")
    with helper(directory, state="running", remaining_seconds=120):
        assert hook_answer() == ""
        Attachments(invocation).contexts.select("docker-offload-web")
        answer = json.loads(hook_answer())
        assert answer["type"] == 0
        assert answer["template"].startswith("The session ends with everything in it in ")
    assert "no helper" in hook_answer()


def test_docker_waits_for_no_helper_of_a_session_that_it_does_not_use(
    invocation: Invocation,
) -> None:
    directory = remember(invocation, "other")
    prepare_sockets(directory)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(helper_socket(directory)))
        silent.listen()
        silent.setblocking(False)
        assert hook_answer() == ""
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_images_at_hand_are_those_of_the_owner_on_the_node_of_the_session() -> None:
    def build(build_id: str, name: str, member: str, node: str, digest: str = "d") -> Build:
        return Build(
            build_id=build_id, name=name, member=member, node_id=node, image_digest=digest,
            state=BuildState.BUILD_STATE_SUCCEEDED,
        )  # fmt: skip

    builds = [
        Build(build_id="b5", name="app", state=BuildState.BUILD_STATE_RUNNING),
        build("b4", "app", "ann", "n1"),
        build("b3", "web", "ben", "n1"),
        build("b2", "job", "ann", "n2"),
        build("b1", "app", "ann", "n1"),
        build("b0", "out", "ann", "n1", ""),
    ]
    assert [one.build_id for one in with_images(builds, older=False)] == ["b4", "b3", "b2"]
    assert [one.build_id for one in with_images(builds, older=True)] == ["b4", "b3", "b2", "b1"]
    session = Session(node_id="n1", owner="ann")
    found = [image_row(one, session)["AtHand"] for one in with_images(builds, older=False)]
    assert found == ["yes", "no", "no"]
    assert image_row(builds[1], None)["AtHand"] == "-"


async def test_stop_leaves_the_session_that_was_started_under_its_question(
    invocation: Invocation, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = remember(invocation, "web")
    local = Attachments(invocation)
    asked_about = local.chosen("web")
    write_record(directory, replace(asked_about, session_id="another"))
    stopping = Stopping(invocation, cast("Connections", None), local, force=True)
    await stopping.stop(asked_about)
    assert "stopped meanwhile" in capfd.readouterr().out
    record = local.record("web")
    assert record is not None
    assert record.session_id == "another"


async def test_damaged_configuration_of_docker_keeps_no_session_here(
    invocation: Invocation, tmp_path: Path
) -> None:
    directory = remember(invocation, "web")
    local = Attachments(invocation)
    record = local.chosen("web")
    local.contexts.write(record.context, engine_socket(directory))
    config = tmp_path / ".docker" / "config.json"
    config.write_text("{")
    assert local.chosen(None) == record
    with pytest.raises(ConfigError, match=r"gone here, but .*not valid JSON") as failed:
        await local.detach(record)
    assert "docker context use default" in failed.value.hint
    assert config.read_text() == "{"
    assert local.records() == []
    assert local.contexts.host(record.context) is None


def test_bundle_is_for_its_owner_whatever_lay_there(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tar.gz", tmp_path / "other"
    path.write_text("planted")
    path.chmod(0o666)
    with path.open() as kept:
        write_bundle(path, "a", {"b": "c"})
        assert kept.read() == "planted"
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.symlink_to(other)
    os.chown(path, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match="link of another user"):
        write_bundle(path, "a", {"b": "c"})
    assert not other.exists()


class _Calls:
    """A gateway that starts a session at once."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    async def start(self, project: str, spec: SessionSpec, **_: Any) -> OpenSessionResponse:
        return OpenSessionResponse(session=Session(session_id="a1", project_id=project, spec=spec))

    async def stop(self, session_id: str, *, timeout: float) -> None:
        assert timeout
        self.stopped.append(session_id)


async def test_start_that_is_interrupted_at_its_very_end_leaves_no_session(
    invocation: Invocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr("offload_client.progress.display.finish_display", interrupted)
    calls = _Calls()
    settings = Settings("g:1", "p")
    nothing = cast("Connections", None)
    starting = Starting(invocation, nothing, settings, SessionSpec(name="web"), "quiet")
    with pytest.raises(asyncio.CancelledError):
        await starting._started(cast("SessionCalls", calls), None)
    assert calls.stopped == ["a1"]
