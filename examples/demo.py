"""`make demo`: one member builds, a second one on another, empty node gets all steps cached.

Everything is real and temporary: a gateway, two nodes with BuildKit and MinIO, started with
`offload-builder up` and stopped at the end, also after Ctrl-C or a failure. Exit code 0 says that
every step of the second member's builds came from the shared cache and that its images have the
same digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EXAMPLES = Path(__file__).resolve().parent
PROJECTS = ("hello", "webapp")
PROGRAMS = Path(sys.executable).parent
READY_SECONDS = 90.0
COMMAND_SECONDS = 300.0
PUBLISH_SECONDS = 120.0
STOP_SECONDS = 90.0
LOADED_IMAGE = "offload-demo-hello:latest"
BUSY_DOCKERFILE = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sleep", "3600"]
"""


class DemoError(Exception):
    """The demo did not show what it should."""


class InterruptError(BaseException):
    """SIGINT or SIGTERM; a BaseException, so that nothing takes it for a failure of the demo."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def say(text: str = "") -> None:
    """Print one line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Processes:
    """All that the demo starts, in sessions of their own: Ctrl-C reaches the demo only."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._starting = False
        self._stopping = False
        self.asked = 0
        """The first signal that asked to stop; 0 for none."""

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        # The newest first: builds end before the pool that runs them.
        for process in reversed(list(self._running)):
            self.stop(process)

    def _interrupt(self, number: int, _frame: object) -> None:
        self.asked = self.asked or number
        # Between the start of a process and its entry in the list nothing may be lost.
        if not self._starting and not self._stopping:
            raise InterruptError(number)

    def start(
        self, command: Sequence[str | Path], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to the file `log`."""
        # Whatever ends the demo, even SIGKILL, what it has started is told to stop.
        dies_with_us = ["setpriv", "--pdeathsig", "INT", "--"] if shutil.which("setpriv") else []
        self._starting = True
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [*dies_with_us, *map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
            self._running.append(process)
        finally:
            self._starting = False
        if self.asked:
            raise InterruptError(self.asked)
        return process

    def run(self, command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> str:
        """Run a command to its end; return what it printed.

        Raises:
            DemoError: it failed; the sentence has the end of its output.
        """
        before = log.stat().st_size if log.exists() else 0
        process = self.start(command, log, environment)
        try:
            code = process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop(process)
            code = None
        self._running.remove(process)
        text = log.read_bytes()[before:].decode("utf-8", "replace")
        if code != 0:
            name = Path(command[0]).name
            how = f"took longer than {COMMAND_SECONDS:.0f} s" if code is None else f"exited {code}"
            raise DemoError(f"{name} {command[1]} {how}:\n{tail(text)}")
        return text

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """End a process as Ctrl-C does; return its exit code."""
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode


@dataclass(frozen=True)
class Row:
    """One build for the table."""

    example: str
    member: str
    node: str
    seconds: float
    sent_bytes: int
    returned_bytes: int
    cached: int
    steps: int
    digest: str


class Member:
    """Somebody with a home directory of its own, logged in at the pool."""

    def __init__(self, processes: Processes, home: Path, address: str, token: str) -> None:
        home.mkdir()
        self._processes = processes
        self._home = home
        kept = ("PATH", "LANG", "TMPDIR", "DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
        self._environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "HOME": str(home),
            "DOCKER_CONFIG": os.environ.get("DOCKER_CONFIG", str(Path.home() / ".docker")),
            # A helper process would outlive the demo.
            "OFFLOAD_RESIDENT": "0",
        }
        self._run("offload", "login", f"https://{address}", "--token", token)

    def _run(self, program: str, *arguments: str | Path) -> str:
        log = self._home / f"{program}.log"
        return self._processes.run([PROGRAMS / program, *arguments], log, self._environment)

    def ask(self, *arguments: str) -> Any:
        """Return what `offload ARGUMENTS --format json` prints."""
        return json.loads(self._run("offload", *arguments, "--format", "json"))

    def show(self, *arguments: str) -> str:
        """Return what `offload ARGUMENTS` prints for people."""
        return self._run("offload", *arguments).rstrip()

    def build(self, example: str, *options: str, tag: str = "") -> Row:
        """Build an example; return what came of it.

        Raises:
            DemoError: it failed.
        """
        self.wait("all nodes are idle", self._all_idle)
        metadata = self._home / f"{example}.json"
        tag = tag or f"demo-{example}"
        began = time.monotonic()
        self._run(
            "offload-build", "--progress", "plain", "--project", example, "-t", tag, *options,
            "--metadata-file", metadata, EXAMPLES / example,
        )  # fmt: skip
        seconds = time.monotonic() - began
        written = json.loads(metadata.read_text())
        build_id = written["buildx.build.ref"].rpartition("/")[2]
        found = self.wait(f"the build of {example} is recorded", lambda: self._ended(build_id))
        stats = found["stats"]
        row = Row(
            example, found["member"], found["node_id"], seconds, stats["context_sent_bytes"],
            stats["returned_bytes"], stats["steps_cached"], stats["steps_total"],
            written["containerimage.digest"],
        )  # fmt: skip
        say(f"    {example:<8} {row.seconds:5.1f} s on {row.node}, {row.cached}/{row.steps} cached")
        return row

    def start_build(self, project: str, context: Path) -> subprocess.Popen[bytes]:
        """Start a build in the background."""
        command: list[str | Path] = [PROGRAMS / "offload-build", "--project", project, context]
        return self._processes.start(command, self._home / "background.log", self._environment)

    def wait_published(self) -> None:
        """Wait until other nodes can read the cache of all builds so far.

        Raises:
            DemoError: it was not written.
        """
        self.wait("the cache is published", self._all_published, PUBLISH_SECONDS)

    def wait(self, what: str, check: Callable[[], Any], timeout: float = COMMAND_SECONDS) -> Any:
        """Call `check` until it returns something; return that.

        Raises:
            DemoError: it does not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (found := check()):
            if time.monotonic() > deadline:
                raise DemoError(f"it did not happen within {timeout:.0f} s that {what}")
            time.sleep(0.1)
        return found

    def busy_node(self, name: str) -> str:
        """Return the node where the build `name` runs; empty while it waits."""
        for build in self.ask("builds"):
            if build["name"] == name and build["state"] == "running":
                return str(build["node_id"])
        return ""

    def _all_idle(self) -> bool:
        nodes = self.ask("status")["nodes"]
        # One node is kept busy on purpose for a part of the demo.
        running = {b["node_id"] for b in self.ask("builds") if b["state"] == "running"}
        return all(node["running"] == (node["node_id"] in running) for node in nodes)

    def _ended(self, build_id: str) -> Any:
        build = self.ask("builds", build_id)
        return build if build["state"] == "succeeded" else None

    def _all_published(self) -> bool:
        states = {build["cache_state"] for build in self.ask("builds")}
        if bad := states & {"failed", "skipped"}:
            raise DemoError(f"the cache of a build was not published: it is {bad.pop()}")
        return states <= {"published", "unchanged"}


class Pool:
    """`offload-builder up` with two nodes of one slot each, and MinIO."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        self._data = folder / "data"
        self._log = folder / "up.log"
        self.address = ""
        self.token = ""

    def start(self) -> None:
        """Start, and wait until it says how to log in.

        Raises:
            DemoError: it ended or did not get ready.
        """
        process = self._processes.start(
            [
                PROGRAMS / "offload-builder", "up", "--nodes", "2", "--minio", "--slots", "1",
                "--data", self._data, "--listen", "127.0.0.1:0",
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

    def create_token(self, name: str) -> str:
        """Return a new member's token."""
        text = self._administer("token", "create", name, "--role", "member")
        token = re.search(r"ofl_\S+", text)
        if token is None:
            raise DemoError("offload-builder token create printed no token")
        return token[0]

    def create_project(self, name: str) -> None:
        """Make a project: what shares a cache."""
        self._administer("project", "create", name)

    def _administer(self, *arguments: str) -> str:
        """Run a command on the gateway's machine, beside the gateway."""
        data = self._data / "gateway"
        command: list[str | Path] = [PROGRAMS / "offload-builder", *arguments, "--data-dir", data]
        return self._processes.run(command, self._log, dict(os.environ))

    def tails(self) -> str:
        """Return the ends of all logs, without tokens."""
        logs = [self._log, *sorted(self._data.glob("node-*/node.log"))]
        texts = (f"--- {log.name}\n{tail(log.read_text('utf-8', 'replace'))}" for log in logs)
        return re.sub(r"ofl_\S+", "ofl_***", "\n".join(texts))


def main() -> int:
    """Run the demo; return the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="odemo-"))
    code = 0
    try:
        with Processes() as processes:
            pool = Pool(processes, folder)
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
            say(f"FAILED: process {pid} was left over and is killed")
            code = code or 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    return code


def run_demo(processes: Processes, pool: Pool, folder: Path) -> None:
    """Show the main job.

    Raises:
        DemoError: something is not as promised.
    """
    for example in PROJECTS:
        if not (EXAMPLES / example / "busybox").exists():
            raise DemoError(f"examples/{example}/busybox is missing; run: make setup")
    say("==> starting a gateway, two nodes and MinIO")
    pool.start()
    for project in PROJECTS:
        pool.create_project(project)
    first = Member(processes, folder / "first", pool.address, pool.token)
    second = Member(processes, folder / "second", pool.address, pool.create_token("bob"))

    say("==> the first member builds")
    rows = [first.build(example) for example in PROJECTS]
    say("==> waiting until the cache is in the shared store")
    first.wait_published()

    say("==> the second member builds, while the first node is busy")
    with busy(first, folder / "busy") as node:
        again = [second.build(example) for example in PROJECTS]
    check(rows, again, node)
    rows += again
    if (loaded := load_into_docker(processes, second, folder)) is not None:
        rows.append(loaded)
    say()
    print_table(rows)
    say()
    say("The second member's node was empty: all its steps came from the shared cache,")
    say("and its images have the same digests.")
    say()
    say("==> offload cache usage")
    say(second.show("cache", "usage"))


@contextlib.contextmanager
def busy(member: Member, context: Path) -> Iterator[str]:
    """Keep the project's preferred node busy with a build that sleeps; give the node's name."""
    context.mkdir()
    shutil.copy(EXAMPLES / PROJECTS[0] / "busybox", context / "busybox")
    (context / "Dockerfile").write_text(BUSY_DOCKERFILE)
    process = member.start_build(PROJECTS[0], context)
    node: str = member.wait("a node is busy", lambda: member.busy_node(context.name), 60.0)
    yield node
    # An interrupt or a failure leaves it to Processes to end it.
    process.send_signal(signal.SIGINT)
    process.wait(STOP_SECONDS)


def check(rows: Sequence[Row], again: Sequence[Row], busy_node: str) -> None:
    """Compare the builds of the two members.

    Raises:
        DemoError: a step ran again, an image differs, or the node was not the other one.
    """
    for one, two in zip(rows, again, strict=True):
        if one.node != busy_node or two.node == busy_node:
            raise DemoError(
                f"{one.example} was built on {one.node} and {two.node} while {busy_node} was busy; "
                "expected the busy node and another one"
            )
        if not two.steps or two.cached != two.steps:
            raise DemoError(
                f"only {two.cached} of {two.steps} steps of {two.example} were cached on the "
                f"second node {two.node}"
            )
        if one.digest != two.digest:
            raise DemoError(f"{one.example} has two digests: {one.digest} and {two.digest}")


def load_into_docker(processes: Processes, member: Member, folder: Path) -> Row | None:
    """Load hello into the local engine and run it, if there is one."""
    log, environment = folder / "docker.log", dict(os.environ)
    docker = shutil.which("docker")
    try:
        if docker is None:
            raise DemoError("docker is not installed")
        processes.run([docker, "version", "--format", "{{.Server.Version}}"], log, environment)
    except DemoError:
        say("==> no running docker engine here: --load and docker run are left out")
        return None
    say("==> loading hello into docker and running it")
    try:
        row = member.build("hello", "--load", tag=LOADED_IMAGE)
        run = [docker, "run", "--rm", "--network", "none", LOADED_IMAGE]
        try:
            printed = processes.run(run, log, environment).splitlines()
        except DemoError as error:
            # The image is there; that this engine starts no containers is not for us to judge.
            say(f"    {error}")
            return row
        if "hello, world" not in printed:
            raise DemoError(f'the image printed {printed} instead of "hello, world"')
        say("    docker run: hello, world")
    finally:
        with contextlib.suppress(DemoError):
            processes.run([docker, "image", "rm", LOADED_IMAGE], log, environment)
    return row


def print_table(rows: Sequence[Row]) -> None:
    """Print the builds as a table."""
    lines = [("EXAMPLE", "MEMBER", "NODE", "TIME", "SENT", "RETURNED", "CACHED", "DIGEST")]
    lines += [
        (
            row.example,
            row.member,
            row.node,
            f"{row.seconds:.1f} s",
            f"{row.sent_bytes:,} B",
            f"{row.returned_bytes:,} B",
            f"{row.cached}/{row.steps}",
            row.digest.removeprefix("sha256:")[:12],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("   ".join(cells).rstrip())


def left_over(folder: Path) -> list[int]:
    """Return processes that still work in the demo's directory."""
    needle = os.fsencode(folder)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                texts = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                if any(needle in text for text in texts):
                    found.append(int(entry.name))
    return found


def tail(text: str, lines: int = 15) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
