"""The life of a session's helper: networks that break, sessions that end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload_client.sessions.control import HelperAwayError, ask_helper
from offload_client.sessions.records import (
    RECORD_FILE,
    engine_socket,
    helper_socket,
    noted_end,
    remove_record,
    write_record,
)
from offload_proto.v1 import sessions_service_pb2 as pb
from tests.fixtures.cutrelay import CutRelay
from tests.fixtures.engine import DockerEngine
from tests.fixtures.ports import free_port
from tests.fixtures.sessionnode import (
    PATIENCE,
    WEB,
    SessionHelper,
    SessionServer,
    fetched,
    import_busybox,
    listens,
    session_engine,
    until,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    with session_engine() as running:
        import_busybox(running)
        yield running


@pytest.fixture
def server(engine: DockerEngine, tmp_path: Path) -> Iterator[SessionServer]:
    with SessionServer(engine, tmp_path) as running:
        yield running


def ended(helper: SessionHelper) -> int:
    assert helper.process is not None
    return helper.process.wait(PATIENCE)


def test_the_tunnel_comes_back_after_a_cut_and_containers_go_on(
    server: SessionServer, tmp_path: Path
) -> None:
    port = free_port()
    with CutRelay(server.node_address) as relay:
        server.endpoints = [relay.address]
        with SessionHelper(server, tmp_path / "home") as helper:
            serve = "echo up; exec httpd -f -h /bin"
            done = helper.docker(
                "run", "-d", "--name", "web", "-p", f"{port}:80", "box", "/bin/sh", "-c", serve
            )
            assert done.returncode == 0, done.stderr
            until(lambda: b"200 OK" in fetched(port), "the web server")
            with subprocess.Popen(
                ["docker", "logs", "-f", "web"], env=helper.environment, stdout=subprocess.PIPE
            ) as follow:
                assert follow.stdout is not None
                assert follow.stdout.readline() == b"up\n"
                before = relay.connections
                relay.cut()
                # The command that was at work ends; the next one sees nothing of it.
                follow.wait(PATIENCE)
            shown = helper.docker("ps", "--format", "{{.Names}}")
            assert (shown.returncode, shown.stdout) == (0, b"web\n")
            assert relay.connections > before
            until(lambda: b"200 OK" in fetched(port), "the web server after the cut")
            assert helper.ask("status")["reconnecting_since"] is None
            # Nobody answers at the old address any more; the gateway knows another one.
            server.endpoints = ["127.0.0.1:1", server.node_address]
            relay.target = "127.0.0.1:1"
            relay.cut()
            assert helper.docker("rm", "-f", "web").returncode == 0
            until(lambda: not listens(port), "the end of the port")


def test_a_command_hears_why_a_session_cannot_be_reached(
    server: SessionServer, tmp_path: Path
) -> None:
    with CutRelay(server.node_address) as relay:
        server.endpoints = [relay.address]
        with SessionHelper(server, tmp_path / "home") as helper:
            relay.target = "127.0.0.1:1"
            relay.cut()
            until(lambda: helper.ask("status")["reconnecting_since"], "the break")
            done = helper.docker("ps")
            assert done.returncode == 1
            assert b"the session cannot be reached" in done.stderr


def test_a_paused_session_is_woken_by_the_next_command(
    server: SessionServer, tmp_path: Path
) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        server.state = pb.SESSION_STATE_PAUSED
        until(lambda: helper.ask("status")["state"] == "paused", "the pause")
        assert helper.docker("ps").returncode == 0
        until(lambda: helper.ask("status")["state"] == "running", "the session")


@pytest.mark.parametrize("end", ["told", "unknown", "record", "stop"])
def test_a_helper_ends_with_its_session(server: SessionServer, tmp_path: Path, end: str) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        assert helper.docker("ps").returncode == 0
        if end in ("told", "unknown"):
            if end == "told":
                server.reason = "it was idle for too long"
                server.state = pb.SESSION_STATE_ENDED
            else:
                server.known = False
                server.forget()
            until(lambda: noted_end(helper.directory), "the note of the end")
            # It stays for a while, so that docker's commands hear why.
            done = helper.docker("ps")
            assert done.returncode == 1
            assert noted_end(helper.directory).encode() in done.stderr
            assert helper.ask("status")["state"] == "ended"
            remove_record(helper.directory)
        elif end == "record":
            remove_record(helper.directory)
        else:
            assert helper.ask("stop") == {"stopping": True, "warnings": []}
        assert ended(helper) == 0
        assert not engine_socket(helper.directory).exists()
        with pytest.raises(HelperAwayError):
            ask_helper(helper_socket(helper.directory), "status")


def test_one_helper_serves_a_session_and_another_follows_a_killed_one(
    server: SessionServer, tmp_path: Path
) -> None:
    port = free_port()
    with SessionHelper(server, tmp_path / "home") as helper:
        second = subprocess.run(
            [sys.executable, "-m", "offload_client.sessions.helper", str(helper.directory)],
            env=helper.environment, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert second.returncode == 0
        done = helper.docker("run", "-d", "--name", "old", "-p", f"{port}:80", *WEB)
        assert done.returncode == 0, done.stderr
        process = helper.process
        assert process is not None
        process.kill()
        process.wait()
        assert engine_socket(helper.directory).exists()
        helper.start()
        until(lambda: b"200 OK" in fetched(port), "the port of before")
        assert helper.docker("rm", "-f", "old").returncode == 0


def test_a_helper_is_small(server: SessionServer, tmp_path: Path) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        for _ in range(3):
            assert helper.docker("ps").returncode == 0
        assert helper.process is not None
        text = Path(f"/proc/{helper.process.pid}/smaps_rollup").read_text()
    private = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")]
    assert sum(private) < 60 << 10


def test_without_a_record_there_is_no_helper(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "offload_client.sessions.helper", str(tmp_path)],
        capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert b"usage" in done.stderr


def test_a_helper_goes_on_while_its_record_cannot_be_read(
    server: SessionServer, tmp_path: Path
) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        record = helper.directory / RECORD_FILE
        text = record.read_bytes()
        record.write_bytes(b"{")
        # It looks more often than its log is long.
        until(lambda: "cannot read" in helper.log(), "the look at the record")
        record.write_bytes(text)
        assert helper.docker("ps").returncode == 0


def test_a_helper_without_its_socket_ends_and_another_one_follows(
    server: SessionServer, tmp_path: Path
) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        process = helper.process
        assert process is not None
        engine_socket(helper.directory).unlink()
        # It waits for the end of the other one.
        helper.start()
        assert process.wait(PATIENCE) == 0
        assert helper.docker("ps").returncode == 0
        assert helper.ask("status")["pid"] == helper.process.pid  # type: ignore[union-attr]


def test_a_helper_that_ends_late_takes_nothing_from_its_successor(
    server: SessionServer, tmp_path: Path
) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        process = helper.process
        assert process is not None
        # A session was stopped while its helper did not answer, and another one is started.
        process.send_signal(signal.SIGSTOP)
        remove_record(helper.directory)
        write_record(helper.directory, replace(helper.record, session_id="fedcba9876543210"))
        second = subprocess.Popen(
            [sys.executable, "-m", "offload_client.sessions.helper", str(helper.directory)],
            env=helper.environment,
        )
        try:
            until(lambda: engine_socket(helper.directory).exists(), "the second helper")
            process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) == 0
            assert engine_socket(helper.directory).exists()
            assert helper.ask("status")["pid"] == second.pid
        finally:
            second.kill()
            second.wait()


def test_a_helper_may_have_many_connections(server: SessionServer, tmp_path: Path) -> None:
    with SessionHelper(server, tmp_path / "home") as helper:
        assert helper.process is not None
        text = Path(f"/proc/{helper.process.pid}/limits").read_text()
    soft, hard = next(
        line.split()[3:5] for line in text.splitlines() if line.startswith("Max open files")
    )
    assert int(soft) == min(int(hard), 65536)
