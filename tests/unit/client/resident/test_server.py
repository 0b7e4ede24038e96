"""The helper's socket: who may use it, what it does with nonsense, when it ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_client.invocation import Invocation
from offload_client.resident.launch import start_helper
from offload_client.resident.request import read_request
from offload_client.resident.server import Helper
from offload_client.resident.thin import helper_enabled, needs_this_process, socket_path

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path, as unix sockets need it."""
    with tempfile.TemporaryDirectory(prefix="ores-") as name:
        yield Path(name)


async def until_exists(path: Path) -> None:
    async with asyncio.timeout(5):
        while not path.exists():
            await asyncio.sleep(0.01)


async def test_idle_helper_ends_and_removes_its_socket(folder: Path) -> None:
    path = folder / "h.sock"
    began = time.monotonic()
    await Helper(path, 0.3).serve()
    assert 0.2 < time.monotonic() - began < 3
    assert not path.exists()


async def test_second_helper_leaves_at_once(folder: Path) -> None:
    path = folder / "h.sock"
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(Helper(path, 0.8).serve())
        await until_exists(path)
        inode = path.stat().st_ino
        began = time.monotonic()
        await Helper(path, 60).serve()
        assert time.monotonic() - began < 0.5
        assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"\0", (1 << 31).to_bytes(4, "big"), (5).to_bytes(4, "big") + b"hello", b"\0\0\0\0"],
)
async def test_nonsense_is_dropped_and_the_next_command_served(
    folder: Path, request_bytes: bytes
) -> None:
    path = folder / "h.sock"
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(Helper(path, 0.5).serve())
        await until_exists(path)
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.readexactly(1) == b"+"
        writer.write(request_bytes)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        code, out = await asyncio.to_thread(ask, path, folder, ["--version"])
        assert code == 0
        assert out.startswith(b"offload-build, version")


def ask(path: Path, cwd: Path, arguments: list[str]) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX) as connection, tempfile.TemporaryFile() as out:
        connection.settimeout(10)
        connection.connect(str(path))
        assert connection.recv(1) == b"+"
        payload = "\0".join([str(cwd), str(len(arguments)), *arguments, "HOME=/"]).encode()
        socket.send_fds(connection, [len(payload).to_bytes(4, "big")], [out.fileno()] * 3)
        connection.sendall(payload)
        code = int.from_bytes(connection.recv(4), "big")
        out.seek(0)
        return code, out.read()


async def test_received_descriptors_are_not_inherited_by_children(folder: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        payload = b"/\x000"
        socket.send_fds(here, [len(payload).to_bytes(4, "big")], [0, 1, 2])
        here.sendall(payload)
        descriptors: list[int] = []
        request = await read_request(there, descriptors)
        assert [os.get_inheritable(number) for number in descriptors] == [False] * 3
        assert (request.cwd, list(request.arguments)) == (Path("/"), [])
        for number in descriptors:
            os.close(number)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("DOCKER_CONFIG=conf", "/work/here/conf"),
        ("DOCKER_CONFIG=/conf", "/conf"),
        ("HOME=", ""),
        ("OFFLOAD_BUILDX=./own", "/work/here/own"),
        ("OFFLOAD_BUILDX=none", "none"),
        ("ANY=conf", "conf"),
    ],
)
async def test_relative_paths_in_the_environment_are_those_of_the_command(
    given: str, expected: str
) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        payload = f"/work/here\x000\0{given}".encode()
        socket.send_fds(here, [len(payload).to_bytes(4, "big")], [0, 1, 2])
        here.sendall(payload)
        descriptors: list[int] = []
        request = await read_request(there, descriptors)
        for number in descriptors:
            os.close(number)
    assert list(request.environment.values()) == [expected]


def test_pipelines_use_no_helper_unless_told() -> None:
    assert helper_enabled({})
    assert not helper_enabled({"CI": "true"})
    assert not helper_enabled({"OFFLOAD_TOKEN": "x"})
    assert not helper_enabled({"OFFLOAD_RESIDENT": "0"})
    assert helper_enabled({"OFFLOAD_RESIDENT": "1", "CI": "true"})


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("/dev/stdout", True),
        ("type=tar,dest=/dev/fd/63", True),
        ("/proc/self/cwd", True),
        ("/dev/shm/project", False),
        ("type=local,src=/dev/shm/a,dest=/dev/stdout", True),
        ("src/dev", False),
    ],
)
def test_what_only_the_commands_own_process_sees_stays_there(argument: str, needed: bool) -> None:
    assert needs_this_process(argument) is needed


def test_socket_depends_on_how_the_process_sees_the_system(folder: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(folder)}
    first = socket_path(environment)
    assert first.startswith(f"{folder}/offload/")
    mask = os.umask(0o077)
    try:
        os.umask(mask ^ 0o020)
        assert socket_path(environment) != first
    finally:
        os.umask(mask)
    assert socket_path(environment) == first
    long = socket_path({"XDG_RUNTIME_DIR": "/" + "x" * 200})
    assert long.startswith(f"/tmp/offload-{os.getuid()}/")


@pytest.mark.parametrize("how", ["owner", "mode", "link"])
def test_directory_that_others_can_reach_is_not_used(folder: Path, how: str) -> None:
    directory = folder / "offload"
    if how == "link":
        (folder / "real").mkdir(mode=0o700)
        directory.symlink_to("real")
        os.chown(directory, 12345, 12345, follow_symlinks=False)
    else:
        directory.mkdir(mode=0o700)
        os.chown(directory, 12345 if how == "owner" else -1, -1)
        directory.chmod(0o770 if how == "mode" else 0o700)
    environment = {"XDG_RUNTIME_DIR": str(folder), "PATH": os.environ["PATH"]}
    null = Path(os.devnull).open("w")  # noqa: SIM115
    with null:
        start_helper(Invocation([], folder, environment, 0, null, null))
        time.sleep(0.1)
    assert list(directory.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path(environment))
        listener.listen()
        listener.settimeout(0.1)
        code = "import sys; from offload_client.resident.thin import *; print(run_in_helper(['x']))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=10,
            env={**environment, "OFFLOAD_RESIDENT": "1"},
        )  # fmt: skip
        assert done.stdout.strip() == "None"
        with pytest.raises(TimeoutError):
            listener.accept()
