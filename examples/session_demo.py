"""`make demo-session`: docker commands of this machine run on a node, with ports and directories.

Everything is real and temporary: a gateway and one node with BuildKit and docker engines, started
with `offload-builder up` and stopped at the end, also after Ctrl-C or a failure. The user of the
demo has a home directory of their own, so docker's configuration of whoever runs it stays as it is.
Exit code 0 says that everything was seen that the table shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from demo import (
    EXAMPLES,
    PROGRAMS,
    READY_SECONDS,
    DemoError,
    InterruptError,
    Pool,
    Processes,
    left_over,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

WANTED_PORT = 8081
IMAGE = "hello"
SEEN_SECONDS = 30.0
PAGE, EDITED = "served from this machine", "edited on this machine"


class OneNode(Pool):
    """`offload-builder up` with one node, which keeps an engine ready for the next session."""

    def start(self) -> None:
        """Start, and wait until it says how to log in.

        Raises:
            DemoError: it ended or did not get ready.
        """
        process = self._processes.start(
            [
                PROGRAMS / "offload-builder", "up", "--nodes", "1", "--data", self._data,
                "--listen", "127.0.0.1:0", "--isolation", "netns",
            ],
            self._log,
            dict(os.environ),
        )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        pattern = re.compile(r"offload login https://(\S+) --token (\S+)\n")
        while not (match := pattern.search(self._log.read_text("utf-8", "replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the pool did not start:\n{self.tails()}")
            time.sleep(0.05)
        self.address, self.token = match[1], match[2]


class User:
    """Somebody with an empty home, whose commands are shown with what they print."""

    def __init__(self, processes: Processes, home: Path) -> None:
        self.folder = home / "app"
        self.folder.mkdir(parents=True)
        plugins = home / ".docker" / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-offload").symlink_to(PROGRAMS / "docker-offload")
        self._processes = processes
        self._log = home / "commands.log"
        kept = ("LANG", "TMPDIR")
        self._environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "HOME": str(home),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            # A helper for builds would outlive the demo; that of the session ends with it.
            "OFFLOAD_RESIDENT": "0",
            "OFFLOAD_KEYRING": "off",
        }
        self.rows: list[tuple[str, str, str]] = []

    def run(self, *command: str | Path, quiet: bool = False) -> tuple[str, float]:
        """Run a command in the user's folder; return its output and its seconds.

        Raises:
            DemoError: it failed.
        """
        words = [str(word) for word in command]
        if not quiet:
            say(f"$ {shlex.join(words)}")
        began = time.monotonic()
        inside = ["env", "--chdir", str(self.folder), *words]
        text = self._processes.run(inside, self._log, self._environment).rstrip()
        if not quiet and text:
            say(text)
        return text, time.monotonic() - began

    def note(self, what: str, seconds: float, seen: str) -> None:
        """Keep a row for the table."""
        taken = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
        self.rows.append((what, taken, seen))


def fetch(port: int, wanted: str) -> float:
    """Ask the port of this machine until the answer has a text; return the seconds.

    Raises:
        DemoError: it does not come.
    """
    began = time.monotonic()
    answer = ""
    while wanted not in answer:
        if time.monotonic() - began > SEEN_SECONDS:
            raise DemoError(f"http://127.0.0.1:{port}/ does not say {wanted!r} but {answer!r}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
                answer = reply.read().decode()
        except OSError as error:
            answer = str(error)
        time.sleep(0.005)
    return time.monotonic() - began


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    for port in (WANTED_PORT, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise DemoError("this machine has no free port")


def run_demo(processes: Processes, pool: Pool, folder: Path) -> None:
    """Show a session from its start to its end.

    Raises:
        DemoError: something is not as promised.
    """
    if shutil.which("docker") is None:
        raise DemoError("docker's command line is not installed; run: deploy/setup.sh session")
    if not (EXAMPLES / IMAGE / "busybox").exists():
        raise DemoError(f"examples/{IMAGE}/busybox is missing; run: make setup")
    say("==> starting a gateway and a node")
    pool.start()
    user = User(processes, folder / "home")
    user.run("offload", "login", f"https://{pool.address}", "--token", pool.token, quiet=True)
    say("==> building an image on the node; it stays there")
    user.run("offload-build", "--progress", "plain", "-t", IMAGE, EXAMPLES / IMAGE, quiet=True)
    (user.folder / "index.html").write_text(PAGE + "\n")
    say("==> a session")
    show(user, free_port())
    say()
    print_table(user.rows)


def show(user: User, port: int) -> None:
    """Start a session, use it, and stop it."""
    _, seconds = user.run("docker", "offload", "start")
    user.note("docker offload start", seconds, "a docker engine of one's own")
    _, seconds = user.run(
        "docker", "run", "-d", "--name", "web", "-p", f"{port}:80", "-v", f"{user.folder}:/srv",
        IMAGE, "/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/srv",
    )  # fmt: skip
    user.note("docker run -d -p -v", seconds, "the image came from the node's registry")
    user.note(f"GET 127.0.0.1:{port}", fetch(port, PAGE), PAGE)
    (user.folder / "index.html").write_text(EDITED + "\n")
    user.note("edit here, GET again", fetch(port, EDITED), EDITED)
    user.run("docker", "ps", "--format", "table {{.Names}}\t{{.Status}}\t{{.Ports}}")
    _, seconds = user.run(
        "docker", "run", "--rm", "-v", f"{user.folder}:/srv", IMAGE,
        "/bin/busybox", "sh", "-c", "echo made there > /srv/made",
    )  # fmt: skip
    made = user.folder / "made"
    if not made.exists():
        raise DemoError("what the container wrote is not here when docker run returns")
    user.note("docker run --rm -v", seconds, f"{made.read_text().strip()}, and is here")
    user.run("docker", "offload", "status")
    _, seconds = user.run("docker", "offload", "stop", "--force")
    context, _ = user.run("docker", "context", "show", quiet=True)
    if context != "default":
        raise DemoError(f"docker uses {context} after the end of the session")
    user.note("docker offload stop --force", seconds, "nothing is left; docker is as before")


def print_table(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print what was done, how long it took and what was seen."""
    lines = [("COMMAND", "TIME", "SEEN"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("   ".join(cells).rstrip())


def main() -> int:
    """Run the demo; return the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="odemo-"))
    code = 0
    try:
        with Processes() as processes:
            pool = OneNode(processes, folder)
            try:
                run_demo(processes, pool, folder)
            except DemoError as error:
                code = 1
                say(f"FAILED: {error}")
                say(pool.tails() if pool.address else "")
            except InterruptError as error:
                code = error.exit_code
            say("==> stopping everything")
        if code == 0 and processes.asked:
            code = 128 + processes.asked
    finally:
        for pid in left_over(folder):
            if code == 0:
                say(f"FAILED: process {pid} was left over and is killed")
                code = 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
