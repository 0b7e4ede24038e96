"""Our side: a gateway, nodes with a shared cache in S3, and a member who builds on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.commands import Finished, Place, run
from benchmarks.daemons import Daemon, tool_environment
from benchmarks.model import BenchmarkError
from benchmarks.settle import wait_quiet
from benchmarks.terminal import run_on_terminal
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from benchmarks.terminal import Reader
    from tests.fixtures.minio import MinioServer

BIN = Path(sys.executable).parent
WAIT_SECONDS = 60.0
PUBLISH_SECONDS = 300.0
SETTLED = frozenset(("published", "unchanged", "skipped"))


class Pool:
    """A gateway; nodes come and go. A context manager.

    Args:
        work: for its data.
        minio: holds the shared cache in bucket `offload`.
        host: address on which gateway and nodes listen.
        buildkitd: program for the nodes to run; theirs when None.
    """

    def __init__(
        self,
        work: Path,
        minio: MinioServer,
        *,
        host: str = "127.0.0.1",
        buildkitd: Path | None = None,
    ) -> None:
        self._work = work
        self._minio = minio
        self._host = host
        self._buildkitd = buildkitd
        self._stack = ExitStack()
        self._environment = tool_environment(work)
        self._nodes: dict[str, Daemon] = {}
        self._gateway: Daemon
        self._token = ""
        self.address = f"{host}:{free_port()}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            log = self._work / "gateway.log"
            gateway = Daemon(
                "gateway",
                [BIN / "offload-builder", "gateway", "--data-dir", self._work / "gateway",
                 "--listen", self.address, "--log-level", "error"],
                log=log,
                environment=self._environment,
                ready=lambda: _listens(self.address),
            )  # fmt: skip
            self._gateway = stack.enter_context(gateway)
            self._token = self._make_token("node", "nodes")
            stack.callback(self._stop_nodes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_node(
        self,
        name: str,
        viewer: Member,
        *,
        slots: int = 0,
        isolation: str = "none",
        **further: str,
    ) -> None:
        """Start a node with an empty data directory, and return when it takes builds.

        Args:
            name: of the node.
            viewer: somebody who sees it come.
            slots: builds that may run at once; 0 for the node's own default.
            isolation: "netns" for builds behind the firewall, where no peer reaches BuildKit
                by TCP.
            further: settings of the node, as in its configuration.
        """
        address = f"{self._host}:{free_port()}"
        settings = {
            "gateway": self.address,
            "data": str(self._work / name),
            "node_id": name,
            "listen": address,
            "isolation": isolation,
            "advertise": address,
            "token": self._token,
            "log_level": "error",
            "s3_endpoint": self._minio.endpoint_url,
            "s3_access_key": self._minio.access_key,
            "s3_secret_key": self._minio.secret_key,
            **further,
        }
        if slots:
            settings["slots"] = str(slots)
        if self._buildkitd is not None:
            settings["buildkitd"] = str(self._buildkitd)
        node = Daemon(
            name,
            [BIN / "offload-builder", "node"],
            log=self._work / f"{name}.log",
            environment=self._environment
            | {f"OFFLOAD_NODE_{key.upper()}": value for key, value in settings.items()},
            ready=lambda: viewer.ready_nodes() == [name],
        )
        self._nodes[name] = node
        node.__enter__()

    def stop_node(self, name: str, viewer: Member) -> None:
        """Stop a node, and return when the gateway has noticed."""
        self._nodes.pop(name).stop()
        deadline = time.monotonic() + WAIT_SECONDS
        while name in viewer.ready_nodes():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the gateway still counts on {name}")
            time.sleep(0.05)

    def _stop_nodes(self) -> None:
        for name in list(self._nodes):
            self._nodes.pop(name).stop()

    def buildkit(self, name: str, project: str = "default") -> str:
        """Return the address of the BuildKit that a node runs for a project."""
        file = self._work / name / "projects" / project / "buildkit" / "buildkitd.toml"
        addresses: list[str] = tomllib.loads(file.read_text())["grpc"]["address"]
        return addresses[0]

    def wait_quiet(self) -> None:
        """Wait until gateway and nodes rest."""
        wait_quiet([self._gateway.pid, *(node.pid for node in self._nodes.values())])

    def gateway_pid(self) -> int:
        """Return the process id of the gateway."""
        return self._gateway.pid

    def node_pid(self, name: str) -> int:
        """Return the process id of a node's agent; its BuildKit is a child of it."""
        return self._nodes[name].pid

    def member(self, name: str, place: Place = nullcontext) -> Member:
        """Return a new member who is logged in; a context manager."""
        member = Member(self._work / f"member-{name}", place)
        member.login(self.address, self._make_token("member", name))
        return member

    def runner(self, name: str, place: Place = nullcontext) -> Member:
        """Return a pipeline: an empty home and a token in the environment; a context manager."""
        member = Member(self._work / f"runner-{name}", place)
        member.environment |= {
            "CI": "true",
            "OFFLOAD_GATEWAY": self.address,
            "OFFLOAD_TOKEN": self._make_token("member", name),
        }
        return member

    def _make_token(self, role: str, name: str) -> str:
        # Every node of the pool comes with the same one.
        uses = ["--uses", "0"] if role == "node" else []
        done = run(
            [BIN / "offload-builder", "token", "create", "--data-dir", self._work / "gateway",
             "--role", role, *uses, "--format", "json", name],
            environment=self._environment,
            folder=self._work,
        )  # fmt: skip
        token: str = json.loads(done.output[done.output.index("{") :])["token"]
        return token


class Member:
    """One user with a home of their own; a context manager that ends their resident helper.

    Args:
        home: their home directory, which is made.
        place: where their commands run.
    """

    def __init__(self, home: Path, place: Place = nullcontext) -> None:
        self._home = home
        self._place = place
        self._runtime = home / "run"
        self._runtime.mkdir(parents=True, mode=0o700)
        # A terminal's environment: with XDG_RUNTIME_DIR, without CI.
        self.environment = tool_environment(home, XDG_RUNTIME_DIR=str(self._runtime))

    def login(self, gateway: str, token: str) -> None:
        """Log in at a gateway, HOST:PORT."""
        self._offload("login", f"https://{gateway}", "--token", token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self._runtime / "offload").glob("*.sock"):
            _end_listener(path)

    def build(
        self, context: Path, *arguments: str, helper: bool = True, docker_host: str = ""
    ) -> Finished:
        """Run `offload-build`.

        Args:
            context: directory.
            arguments: more of them.
            helper: whether the resident helper may be used, as in a terminal but not in CI.
            docker_host: engine for --load.
        """
        environment = dict(self.environment)
        if not helper:
            environment["OFFLOAD_RESIDENT"] = "0"
        if docker_host:
            environment["DOCKER_HOST"] = docker_host
        return run(
            [BIN / "offload-build", *arguments, str(context)],
            environment=environment,
            folder=self._home,
            place=self._place,
        )

    def build_on_terminal(self, context: Path, *arguments: str, reader: Reader) -> Finished:
        """Run `offload-build` on a terminal."""
        return run_on_terminal(
            [BIN / "offload-build", *arguments, str(context)],
            environment=self.environment,
            folder=self._home,
            reader=reader,
            place=self._place,
        )

    def help(self) -> Finished:
        """Run `offload-build --help`."""
        return run(
            [BIN / "offload-build", "--help"],
            environment=self.environment,
            folder=self._home,
            place=self._place,
        )

    def wait_helper(self) -> None:
        """Wait until the resident helper listens; the first build has started it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not list((self._runtime / "offload").glob("*.sock")):
            if time.monotonic() > deadline:
                raise BenchmarkError("the resident helper did not start")
            time.sleep(0.05)

    def helper_pid(self) -> int:
        """Return the process id of the resident helper; it has to run.

        Raises:
            BenchmarkError: it does not.
        """
        for path in (self._runtime / "offload").glob("*.sock"):
            with contextlib.suppress(OSError):
                return _listener(path)
        raise BenchmarkError("the resident helper does not run")

    def wait_published(self) -> None:
        """Wait until the cache of the latest builds is where every node can read it."""
        deadline = time.monotonic() + PUBLISH_SECONDS
        while True:
            latest = self._json("builds", "-n", "5", "--format", "json")
            states = {build["cache_state"] for build in latest}
            if states <= SETTLED:
                return
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the cache was not published in time: {sorted(states)}")
            time.sleep(0.1)

    def ready_nodes(self) -> list[str]:
        """Return the names of the nodes that take builds."""
        nodes = self._json("status", "--format", "json")["nodes"]
        return [node["node_id"] for node in nodes if node["state"] == "ready"]

    def make_builder(self, name: str, docker_config: Path) -> None:
        """Make a builder of stock buildx, for whoever has this docker configuration."""
        self._offload("buildx", "create", name, DOCKER_CONFIG=str(docker_config))

    def builder_folder(self, name: str) -> Path:
        """Return where the certificate of a builder is."""
        return self._home / ".config" / "offload" / "buildx" / name

    def _json(self, *arguments: str) -> Any:
        return json.loads(self._offload(*arguments))

    def _offload(self, *arguments: str, **environment: str) -> str:
        with self._place():
            done = subprocess.run(
                [BIN / "offload", *arguments],
                env=self.environment | environment,
                capture_output=True,
                text=True,
                timeout=WAIT_SECONDS,
                check=False,
            )
        if done.returncode != 0:
            raise BenchmarkError(f"offload {arguments[0]} failed: {done.stderr}")
        return done.stdout


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2):
        return True
    return False


def _end_listener(path: Path) -> None:
    """End the process that listens on a unix socket."""
    with contextlib.suppress(OSError):
        os.kill(_listener(path), signal.SIGTERM)


def _listener(path: Path) -> int:
    """Return the process that listens on a unix socket.

    Raises:
        OSError: nobody does.
    """
    with socket.socket(socket.AF_UNIX) as knock:
        knock.settimeout(5.0)
        knock.connect(str(path))
        credentials = knock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid
