"""A command imports what it needs and nothing else: start-up is what people feel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

SCRIPT = """
import sys
before = set(sys.modules)
from offload_client.cli.entry import build_main
try:
    build_main()
except SystemExit as end:
    code = end.code
import json
print(json.dumps([code, sorted(set(sys.modules) - before)]), file=sys.__stderr__)
"""


def run(*arguments: str, **environment: str) -> tuple[int, set[str], str]:
    """Return exit code, modules loaded by the command, and its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True, text=True, timeout=20, env={**os.environ, **environment},
    )  # fmt: skip
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, set(modules), done.stdout


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_help_needs_no_parser() -> None:
    code, modules, out = run("--help", COLUMNS="80")
    assert code == 0
    assert "Usage: offload-build" in out
    heavy = {
        "aiohttp", "asyncio", "click", "cryptography", "docker", "google", "grpc", "offload_proto",
        "requests", "sqlite3", "ssl", "structlog", "subprocess", "tomllib", "zstandard",
    }  # fmt: skip
    assert not packages(modules) & heavy


def test_wrong_flag_is_told_without_grpc() -> None:
    code, modules, _ = run("--nope", OFFLOAD_RESIDENT="0")
    assert code == 125
    assert not packages(modules) & {"asyncio", "docker", "google", "grpc", "structlog"}


def test_command_for_the_helper_loads_only_the_thin_client(tmp_path: Path) -> None:
    runtime = tmp_path / "r"
    (runtime / "offload").mkdir(parents=True)
    (runtime / "offload").chmod(0o700)
    environment = {"XDG_RUNTIME_DIR": str(runtime), "OFFLOAD_RESIDENT": "1"}
    path = subprocess.run(
        [sys.executable, "-c",
         "from offload_client.resident.thin import *; print(socket_path(os.environ))"],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    ).stdout.strip()  # fmt: skip
    requests: list[list[str]] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"+")
            head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
            payload = b""
            while len(payload) < int.from_bytes(head, "big"):
                payload += connection.recv(65536)
            requests.append(payload.decode().split("\0"))
            os.write(descriptors[1], b"from the helper\n")
            for number in descriptors:
                os.close(number)
            connection.sendall((37).to_bytes(4, "big"))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        code, modules, out = run("-t", "x", ".", **environment)
        thread.join(10)
    assert code == 37
    assert out == "from the helper\n"
    assert requests[0][:5] == [str(Path.cwd()), "3", "-t", "x", "."]
    assert "OFFLOAD_RESIDENT=1" in requests[0]
    ours = {name for name in modules if name.startswith("offload")}
    assert ours == {
        "offload_client", "offload_client.cli", "offload_client.cli.entry",
        "offload_client.resident", "offload_client.resident.thin",
    }  # fmt: skip
    # json and what it needs belong to this test.
    assert not packages(modules) & {
        "asyncio", "click", "contextlib", "dataclasses", "pathlib", "signal", "socket",
        "subprocess", "threading", "typing",
    }  # fmt: skip
