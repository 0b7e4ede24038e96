"""What runs: a pool with a node that takes sessions, a user of it, and the other ways to an engine.

The engine is the same one on all ways: that of the session. Its socket at the node is *direct*, an
sshd beside it *ssh*, and the user's docker context the session. So the figures say what lies
between a command and its engine. `plain` cases have an engine of their own: what people have
without us.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.commands import await_exit
from benchmarks.daemons import TOOLS
from benchmarks.model import BenchmarkError
from benchmarks.pool import BIN, Pool
from benchmarks.settle import descendants, wait_quiet
from offload_builder.buildkit.daemon_rundir import run_directory
from tests.fixtures.minio import MinioServer
from tests.fixtures.sessionside import box_archive

if TYPE_CHECKING:
    from benchmarks.pool import Member

PROGRAMS = ("docker", "containerd", "runc", "nft", "ip", "nsenter", "mkfs.ext4", "ssh")
CONTEXT = "docker-offload"
NODE = "node-1"
IMAGE = "box:1"
READY_SECONDS = 60.0
READ_BYTES = 1 << 20


def require_parts() -> None:
    """Look for everything that the benchmark needs.

    Raises:
        BenchmarkError: something is missing; in one sentence.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    missing += [f".tools/bin/{name}" for name in ("dockerd",) if not (TOOLS / name).exists()]
    if missing:
        raise BenchmarkError(f"{', '.join(missing)} cannot be found; run 'make tools'")


class Ground:
    """A pool with one node; a context manager.

    Args:
        work: for all data.
        ready: engines that the node keeps ready.
        settings: further ones of the node, as in its configuration.
    """

    def __init__(self, work: Path, *, ready: int, **settings: str) -> None:
        self.work = work
        self._settings = {"sessions_ready": str(ready), "session_slots": "4"} | settings
        self._stack = ExitStack()
        self._direct: Path | None = None
        self.member: Member
        self.pool: Pool
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.work.mkdir(parents=True)
            minio = stack.enter_context(MinioServer(self.work / "minio"))
            self.pool = stack.enter_context(Pool(self.work, minio))
            self.member = stack.enter_context(self.pool.member("one"))
            # The helper of a session needs a short path for its sockets.
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ses")))
            self.environment = self.member.environment | {"XDG_STATE_HOME": str(home)}
            self.pool.start_node(NODE, self.member, isolation="netns", **self._settings)
            self.archive = box_archive(self.work / "box.tar")
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *options: str) -> float:
        """Start a session; return the seconds of the command."""
        _, seconds = self.offload("start", "--progress", "plain", *options)
        return seconds

    def stop(self) -> None:
        """Stop the session."""
        self.offload("stop", "--force")
        self._direct = None

    def load(self) -> None:
        """Bring the image of all cases into the session."""
        self.docker(self.session, "load", "-q", "-i", str(self.archive))

    def wait_ready(self, count: int) -> None:
        """Wait until the node keeps so many engines ready and rests."""
        deadline = time.monotonic() + READY_SECONDS
        while len(self.sockets()) < count:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the node has {len(self.sockets())} engines, not {count}")
            time.sleep(0.05)
        wait_quiet([self.pool.node_pid(NODE)])

    def offload(self, *arguments: str) -> tuple[str, float]:
        """Run `offload`; return what it printed and its seconds.

        Raises:
            BenchmarkError: it failed.
        """
        return self._run([str(BIN / "offload"), *arguments])

    def docker(self, host: str, *arguments: str) -> tuple[str, float]:
        """Run docker's command line against an engine; return what it printed and its seconds.

        Raises:
            BenchmarkError: it failed.
        """
        return self._run(["docker", "-H", host, *arguments])

    def drained(self, host: str, *arguments: str) -> tuple[int, float]:
        """Run docker's command line, and throw away what it prints; return bytes and seconds.

        Raises:
            BenchmarkError: it failed.
        """
        began = time.perf_counter()
        with subprocess.Popen(
            ["docker", "-H", host, *arguments], env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            count = 0
            while data := os.read(process.stdout.fileno(), READ_BYTES):
                count += len(data)
            code, seconds = await_exit(process, began)
        if code != 0:
            raise BenchmarkError(f"docker {arguments[0]} ended with {code}")
        return count, seconds

    @property
    def session(self) -> str:
        """Address of the session's engine, as docker's context has it."""
        file = self.environment["HOME"]
        for meta in Path(file).glob(".docker/contexts/meta/*/meta.json"):
            found: dict[str, Any] = json.loads(meta.read_text())
            if found["Name"] == CONTEXT:
                return str(found["Endpoints"]["docker"]["Host"])
        raise BenchmarkError("there is no docker context of the session")

    @property
    def direct(self) -> str:
        """Address of the session's engine at the node."""
        if self._direct is None:
            wanted, _ = self.docker(self.session, "info", "-f", "{{.ID}}")
            for path in self.sockets():
                with contextlib.suppress(BenchmarkError):
                    if self.docker(f"unix://{path}", "info", "-f", "{{.ID}}")[0] == wanted:
                        self._direct = path
        if self._direct is None:
            raise BenchmarkError("the session's engine was not found at the node")
        return f"unix://{self._direct}"

    def sockets(self) -> list[Path]:
        """Return the sockets of the node's engines that answer."""
        found = []
        for path in run_directory(self.work / NODE / "sessions").glob("*.sock"):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as knock:
                knock.connect(str(path))
                found.append(path)
        return found

    def engines(self) -> list[list[int]]:
        """Return the processes of each of the node's engines: those with user namespaces of theirs.

        Raises:
            BenchmarkError: there are none.
        """
        own = _users("self")
        below = {_users(pid) for pid in descendants(self.pool.node_pid(NODE))} - {own, ""}
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = [[pid for pid in pids if _users(pid) == users] for users in below]
        if not found:
            raise BenchmarkError("the node has no engine")
        return found

    def helper_pid(self) -> int:
        """Return the process of the session on the user's machine."""
        return listener(Path(self.session.removeprefix("unix://")))

    def _run(self, command: list[str]) -> tuple[str, float]:
        with tempfile.TemporaryFile(dir=self.work) as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.work,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            code, seconds = await_exit(process, began)
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        if code != 0:
            raise BenchmarkError(f"{' '.join(command[:6])} ended with {code}:\n{text}")
        return text, seconds

    def _stop(self) -> None:
        with contextlib.suppress(BenchmarkError):
            self.stop()


def listener(path: Path) -> int:
    """Return the process that listens at a socket."""
    with socket.socket(socket.AF_UNIX) as knock:
        knock.connect(str(path))
        size = struct.calcsize("3i")
        credentials = knock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", credentials)[0])


def _users(pid: int | str) -> str:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/user").readlink())
    return ""
