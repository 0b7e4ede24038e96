"""The docker command line against an engine behind a session's helper."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload_client.sessions.records import engine_socket, helper_socket
from offload_client.sessions.tunnel import REFILL_SECONDS
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


@pytest.fixture(scope="module")
def server(
    engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SessionServer]:
    with SessionServer(engine, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def helper(
    server: SessionServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SessionHelper]:
    with SessionHelper(server, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(engine: DockerEngine) -> Iterator[None]:
    yield
    left = engine.docker("ps", "-aq").stdout.decode().split()
    if left:
        engine.docker("rm", "-f", *left)


def output(helper: SessionHelper, *arguments: str, stdin: bytes | None = None) -> str:
    done = helper.docker(*arguments, stdin=stdin)
    assert done.returncode == 0, (arguments, done, helper.log())
    return done.stdout.decode().strip()


class Terminal:
    """A docker command with a terminal."""

    def __init__(self, helper: SessionHelper, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["docker", *arguments], env={**helper.environment, "TERM": "dumb"},
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def type(self, data: bytes) -> None:
        os.write(self._master, data)

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0, left))
            assert ready, self.seen
            try:
                self.seen += os.read(self._master, 65536)
            except OSError:
                break
        assert text in self.seen

    def ended(self) -> int:
        try:
            return self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            os.close(self._master)


def test_the_sockets_are_their_owners_alone(helper: SessionHelper) -> None:
    for path in (engine_socket(helper.directory), helper_socket(helper.directory)):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_commands_see_the_engine_of_the_session(
    helper: SessionHelper, engine: DockerEngine
) -> None:
    assert (
        output(helper, "info", "-f", "{{.ID}}")
        == engine.docker("info", "-f", "{{.ID}}").stdout.decode().strip()
    )
    assert output(helper, "run", "--rm", "box", "/bin/echo", "a") == "a"
    assert helper.docker("run", "--rm", "box", "/bin/sh", "-c", "exit 7").returncode == 7
    missing = helper.docker("run", "--rm", "box", "/bin/nothing")
    assert missing.returncode == 127
    assert b"no such file" in missing.stderr


def test_what_a_program_reads_ends_when_its_input_ends(helper: SessionHelper) -> None:
    data = os.urandom(3 << 20)
    done = helper.docker("run", "-i", "--rm", "box", "/bin/cat", stdin=data)
    assert (done.returncode, hashlib.sha256(done.stdout).digest()) == (
        0,
        hashlib.sha256(data).digest(),
    )


def test_a_terminal_in_a_container_is_one(helper: SessionHelper) -> None:
    output(helper, "run", "-d", "--name", "shell", "box", "/bin/sleep", "300")
    terminal = Terminal(helper, "exec", "-it", "shell", "/bin/sh")
    terminal.until(b"#")
    terminal.type(b"stty -a >/dev/null && echo o''k; exit 3\n")
    terminal.until(b"ok")
    assert terminal.ended() == 3


def test_detaching_leaves_a_container_running(helper: SessionHelper) -> None:
    terminal = Terminal(helper, "run", "-it", "--name", "kept", "box", "/bin/cat")
    terminal.type(b"hello\n")
    terminal.until(b"hello\r\nhello")
    terminal.type(b"\x10\x11")
    assert terminal.ended() == 0
    assert output(helper, "inspect", "-f", "{{.State.Running}}", "kept") == "true"
    again = Terminal(helper, "attach", "--detach-keys", "ctrl-a", "kept")
    again.type(b"more\n")
    again.until(b"more\r\nmore")
    again.type(b"\x01")
    again.until(b"\n")
    again.ended()
    assert output(helper, "inspect", "-f", "{{.State.Running}}", "kept") == "true"


def test_logs_are_followed_until_somebody_leaves(
    helper: SessionHelper, server: SessionServer
) -> None:
    output(helper, "run", "-d", "--name", "log", "box", "/bin/sh", "-c", "echo one; sleep 300")
    before = helper.ask("status")["received_bytes"]
    follow = subprocess.Popen(
        ["docker", "logs", "-f", "log"], env=helper.environment, stdout=subprocess.PIPE
    )
    assert follow.stdout is not None
    assert follow.stdout.readline() == b"one\n"
    follow.kill()
    follow.wait()
    follow.stdout.close()
    assert helper.ask("status")["received_bytes"] > before
    assert output(helper, "stop", "-t", "0", "log") == "log"


def test_files_and_images_travel_whole(helper: SessionHelper, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "there").write_bytes(data)
    output(helper, "create", "--name", "files", "box", "/bin/true")
    output(helper, "cp", str(tmp_path / "there"), "files:/there")
    output(helper, "cp", "files:/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    output(helper, "save", "-o", str(tmp_path / "image.tar"), "box")
    assert "box" in output(helper, "load", "-i", str(tmp_path / "image.tar"))
    assert output(helper, "image", "inspect", "-f", "{{.Id}}", "box")


def test_a_published_port_is_there_when_run_returns_and_goes_with_its_container(
    helper: SessionHelper,
) -> None:
    port = free_port()
    output(helper, "run", "-d", "--name", "web", "-p", f"{port}:80", *WEB)
    until(lambda: b"200 OK" in fetched(port), "the web server")
    assert b"200 OK" in fetched(port, "::1")
    assert output(helper, "port", "web", "80").startswith(f"0.0.0.0:{port}")
    assert {one["port"] for one in helper.ask("ports")["ports"]} == {port}
    output(helper, "restart", "-t", "0", "web")
    until(lambda: b"200 OK" in fetched(port), "the web server after its restart")
    output(helper, "stop", "-t", "0", "web")
    until(lambda: not listens(port), "the end of the port")
    output(helper, "start", "web")
    until(lambda: b"200 OK" in fetched(port), "the web server after its start")
    output(helper, "rm", "-f", "web")
    until(lambda: not listens(port), "the end of the port")


@pytest.mark.parametrize(
    ("option", "protocol"),
    [
        ("80", "tcp"),
        ("127.0.0.1::80", "tcp"),
        ("{first}-{last}:80", "tcp"),
        ("[::1]:{first}:80", ""),
    ],
)
def test_a_port_is_chosen_as_it_is_asked_for(
    helper: SessionHelper, option: str, protocol: str
) -> None:
    first = free_port()
    text = option.format(first=first, last=first + 10)
    output(helper, "run", "-d", "--name", "chosen", "-p", text, *WEB)
    shown = json.loads(output(helper, "inspect", "chosen"))[0]["NetworkSettings"]["Ports"]
    port = int(shown["80/tcp"][0]["HostPort"])
    host = "::1" if "::1" in option else "127.0.0.1"
    if "first" in option:
        assert first <= port <= first + 10
    until(lambda: b"200 OK" in fetched(port, host), "the web server")
    assert listens(port, "127.0.0.1") == ("::1" not in option)


def test_all_exposed_ports_are_published_where_the_engine_says(helper: SessionHelper) -> None:
    output(helper, "run", "-d", "--name", "all", "-P", "--expose", "80", *WEB)
    port = int(output(helper, "port", "all", "80/tcp").splitlines()[0].rpartition(":")[2])
    until(lambda: b"200 OK" in fetched(port), "the web server")


def test_a_range_takes_the_first_port_that_is_free(helper: SessionHelper) -> None:
    first = free_port()
    with socket.create_server(("127.0.0.1", first)):
        output(helper, "run", "-d", "--name", "range", "-p", f"{first}-{first + 20}:80", *WEB)
    port = int(output(helper, "port", "range", "80/tcp").splitlines()[0].rpartition(":")[2])
    assert first < port <= first + 20


def test_a_port_that_somebody_has_is_refused_as_an_engine_does(
    helper: SessionHelper, engine: DockerEngine
) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        done = helper.docker("run", "-d", "--name", "busy", "-p", f"{port}:80", *WEB)
    engine.docker("run", "-d", "--name", "first", "-p", "18999:80", *WEB)
    direct = engine.docker("run", "-d", "--name", "second", "-p", "18999:80", *WEB)
    told = f"failed to bind host port 0.0.0.0:{port}/tcp: address already in use"
    for answer, reason in ((done, told), (direct, "0.0.0.0:18999 failed: port is already alloc")):
        text = answer.stderr.decode()
        assert answer.returncode == 125
        assert "driver failed programming external connectivity on endpoint" in text
        assert reason in text
    assert output(helper, "inspect", "-f", "{{.State.Status}}", "busy") == "created"
    output(helper, "start", "busy")
    until(lambda: b"200 OK" in fetched(port), "the web server")


def test_datagrams_reach_a_container_and_come_back(helper: SessionHelper) -> None:
    port = free_port()
    code = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 53))\n"
        "while True:\n    data, peer = s.recvfrom(2000)\n    s.sendto(data.upper(), peer)\n"
    )
    folders = {"/usr", "/lib", "/lib64", sys.base_prefix}
    # Volumes of the engine's own machine, which is this one.
    option = "volume-nocopy,volume-opt=type=none,volume-opt=o=bind,volume-opt=device="
    mounts = [
        part
        for at, folder in enumerate(folders)
        for part in ("--mount", f"type=volume,src=v{at},dst={folder},readonly,{option}{folder}")
    ]
    python = str(Path(sys.executable).resolve())
    output(
        helper, "run", "-d", "-p", f"127.0.0.1:{port}:53/udp", *mounts, "box", python, "-c", code
    )
    for _ in range(2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.settimeout(0.5)
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                    peer.connect(("127.0.0.1", port))
                    peer.send(b"hello")
                    assert peer.recv(100) == b"HELLO"
                    break
                assert time.monotonic() < deadline


def test_a_container_from_elsewhere_gets_no_port_of_this_machine(
    helper: SessionHelper, engine: DockerEngine
) -> None:
    own, foreign = free_port(), free_port()
    engine.docker("run", "-d", "--name", "colleague", "-p", f"0.0.0.0:{foreign}:80", *WEB)
    # Whoever opens its ports does so in the order in which containers have started.
    output(helper, "run", "-d", "-p", f"{own}:80", *WEB)
    until(lambda: b"200 OK" in fetched(own), "the web server")
    assert {one["port"] for one in helper.ask("ports")["ports"]} == {own}
    assert not listens(foreign)


def test_a_large_answer_passes_a_port_whole(helper: SessionHelper) -> None:
    port = free_port()
    make = "dd if=/dev/zero of=/bin/large bs=1048576 count=50; exec httpd -f -h /bin"
    output(helper, "run", "-d", "-p", f"{port}:80", "box", "/bin/sh", "-c", make)
    until(lambda: b"HTTP" in fetched(port), "the web server")
    sizes: list[int] = []

    def read() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(b"GET /large HTTP/1.0\r\n\r\n")
            size = 0
            while part := connection.recv(1 << 20):
                size += len(part)
            sizes.append(size)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(sizes) == 2
    assert min(sizes) > 50 << 20


def test_a_directory_is_refused_by_a_node_that_cannot_synchronise(
    helper: SessionHelper, tmp_path: Path
) -> None:
    done = helper.docker("run", "--rm", "-v", f"{tmp_path}:/src", "box", "/bin/true")
    assert done.returncode == 125
    assert b"the session's node does not know this call" in done.stderr
    assert output(helper, "run", "--rm", "-v", "volume:/src", "box", "/bin/echo", "a") == "a"


def test_what_is_no_http_gets_an_error(helper: SessionHelper) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(engine_socket(helper.directory)))
        connection.sendall(b"hello\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_container_without_ports_costs_no_further_call(
    helper: SessionHelper, server: SessionServer
) -> None:
    output(helper, "create", "--name", "plain", "box", "/bin/true")
    _settled(server)
    server.calls.clear()
    output(helper, "start", "plain")
    # One connection was taken by the command, and another one put in its place. Who watches
    # containers once some run has connections of their own.
    calls = [call for call in _settled(server) if call != "unattended"]
    assert calls == ["Engine"]


def _settled(server: SessionServer) -> list[str]:
    """Wait until connections that were taken have others in their place; return all calls."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = list(server.calls)
        time.sleep(10 * REFILL_SECONDS)
        if before and before == server.calls:
            return before
    raise AssertionError("new calls come all the time, or none")


def test_a_program_that_watches_says_that_nobody_waits_for_it(
    helper: SessionHelper, server: SessionServer
) -> None:
    server.calls.clear()
    output(helper, "run", "-d", "--name", "watched", "box", "/bin/sleep", "600")
    # Its events, and what runs already.
    until(lambda: server.calls.count("unattended") >= 2, "the watcher")
    output(helper, "rm", "-f", "watched")


def test_a_diagnosis_has_both_sides(helper: SessionHelper) -> None:
    texts = helper.ask("diagnose")["texts"]
    assert "serving session" in texts["helper.log"]
    assert texts["engine.log"]
