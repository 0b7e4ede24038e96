"""A table of faults: each says cause and remedy in a sentence or two, at once, with its exit code.

`test_faults.py` has the faults that need a pool of their own: a node that is killed, a full disk,
an object store that is down, a BuildKit that dies.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_core.tls import GATEWAY_NAME
from tests.fixtures.authority import Authority
from tests.fixtures.contexts import make_context
from tests.fixtures.gateway import RunningGateway
from tests.fixtures.pool import BIN, Member, wait_for_text
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.fixtures.pool import Pool

AT_ONCE_SECONDS = 2.0
TRIES = 3
"""The machine that runs the tests may be busy; once in time is enough."""
DAY = datetime.timedelta(days=1)
WORDS_AT_MOST = 80


@dataclass
class Scene:
    """Where a fault happens; what a fault makes is undone when its test ends."""

    pool: Pool
    member: Member
    work: Path
    registry: str
    """A registry that asks for a login."""
    stack: ExitStack
    context: Path = field(init=False)

    def __post_init__(self) -> None:
        self.context = make_context(self.work / "context")

    def dockerfile(self, text: str) -> list[str]:
        """Return the command that builds this Dockerfile."""
        (self.context / "Dockerfile").write_text(text)
        return self.build()

    def with_file(self, name: str | bytes, content: bytes) -> list[str]:
        """Return the command that builds all of a context with such a file."""
        (self.context / os.fsdecode(name)).write_bytes(content)
        return self.dockerfile("FROM scratch\nCOPY . /\n")

    def build(self, *arguments: str) -> list[str]:
        """Return a command that builds."""
        return self.build_path(*arguments, str(self.context))

    def build_path(self, *arguments: str) -> list[str]:
        """Return a command that builds what its last word names."""
        return [str(BIN / "offload-build"), "--progress", "plain", *arguments]

    def offload(self, *arguments: str) -> list[str]:
        """Return another command."""
        return [str(BIN / "offload"), *arguments]

    def identity(self, address: str) -> Path:
        """Return the login of the member for an address, copied from the pool's."""
        folder = self.member.home / ".config/offload/gateways"
        target = folder / address.replace(":", "_")
        if not target.exists():
            shutil.copytree(folder / self.pool.address.replace(":", "_"), target)
        return target / "identity"

    def elsewhere(self, address: str) -> list[str]:
        """Return a command that builds at another gateway, with the login of this one."""
        self.identity(address)
        return self.build("--gateway", f"https://{address}")

    def replace_ca(self, address: str, pem: bytes) -> None:
        """Give the login for an address another certificate authority."""
        path = self.identity(address)
        head, _ = path.read_bytes().rsplit(b"\n---\n", 1)
        path.write_bytes(head + b"\n---\n" + pem)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def login_expired(scene: Scene) -> list[str]:
    path = scene.identity(scene.pool.address)
    path.write_bytes(re.sub(rb"^expires \d+", b"expires 1000000000", path.read_bytes()))
    return scene.build()


def wrong_ca(scene: Scene) -> list[str]:
    Authority(scene.work)
    scene.replace_ca(scene.pool.address, (scene.work / "ca.pem").read_bytes())
    return scene.build()


def gateway_with_certificate(begins: datetime.timedelta) -> Callable[[Scene], list[str]]:
    """Return a fault: a gateway whose certificate is valid for a day from then on."""

    def fault(scene: Scene) -> list[str]:
        authority = Authority(scene.work)
        authority.issue("late", begins=begins, lasts=DAY, host=GATEWAY_NAME)
        address = scene.stack.enter_context(tls_server(scene.work / "late"))
        scene.identity(address)
        scene.replace_ca(address, (scene.work / "ca.pem").read_bytes())
        return scene.build("--gateway", f"https://{address}")

    return fault


@contextmanager
def tls_server(files: Path) -> Iterator[str]:
    """Shake hands with whoever comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{files}.pem", f"{files}-key.pem")
    context.set_alpn_protocols(["h2"])
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            connection.settimeout(5)
            try:
                with context.wrap_socket(connection, server_side=True) as shaken:
                    shaken.recv(1)
            except OSError:
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def gateway_silent(scene: Scene) -> list[str]:
    server = scene.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return scene.elsewhere(f"127.0.0.1:{server.getsockname()[1]}")


def login_revoked(scene: Scene) -> list[str]:
    token = scene.pool.create_token("short-lived")
    scene.member = scene.pool.member(token)
    folder = scene.pool.data / "gateway"
    done = subprocess.run(
        [BIN / "offload-builder", "token", "revoke", token.split("_")[1], "--data-dir", folder],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return scene.build()


def other_version(scene: Scene) -> list[str]:
    code = (
        "import sys, offload_core.versions as versions; versions.API_VERSION = 99;"
        "from offload_client.cli.entry import build_main; build_main()"
    )
    return [str(BIN / "python"), "-c", code, *scene.build()[1:]]


def unknown_file_permission(scene: Scene) -> list[str]:
    (scene.work / "ro").mkdir()
    return scene.build("-o", f"type=tar,dest={scene.work}/ro/none/out.tar")


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        name: in kebab-case.
        make: brings the fault about and returns the command that meets it.
        code: exit code, as in docs/errors.md.
        cause: what the sentences must have, as regular expressions: cause first, then remedy.
        seconds: in which all is said; more than at once only where a network is silent.
    """

    name: str
    make: Callable[[Scene], Sequence[str]]
    code: int
    cause: tuple[str, ...]
    seconds: float = AT_ONCE_SECONDS


FAULTS = (
    Fault("login-expired", login_expired, 4, ("login .* has expired", "offload login")),
    Fault("wrong-ca", wrong_ca, 4, ("certificate of the gateway", "offload login")),
    Fault("certificate-expired", gateway_with_certificate(-2 * DAY), 4,
          ("certificate of the gateway .* has expired", "clock")),
    Fault("certificate-not-yet-valid", gateway_with_certificate(DAY), 4,
          ("certificate of the gateway .* is not yet valid", "clock")),
    Fault("gateway-down", lambda scene: scene.elsewhere(closed_port()), 7,
          ("gateway at 127.0.0.1:\\d+ does not answer: connection refused", "check")),
    Fault("gateway-silent", gateway_silent, 7, ("gateway at .* does not answer", "check"), 12.0),
    Fault("gateway-name-unknown", lambda scene: scene.elsewhere("gateway.invalid:7443"), 7,
          ("gateway.invalid", "address|name")),
    Fault("login-revoked", login_revoked, 4, ("revoked", "offload login|administrator")),
    Fault("version-mismatch", other_version, 13, ("newer than",)),
    Fault("unknown-project", lambda scene: scene.build("--project", "nowhere"), 5,
          ("nowhere",)),
    Fault("registry-down-at-from",
          lambda scene: scene.dockerfile(f"FROM {closed_port()}/app:1\n"), 1,
          ("connection refused", "down or not reachable from the node; check its address")),
    Fault("registry-down-at-push",
          lambda scene: scene.build("-t", f"{closed_port()}/app:1", "--push"), 1,
          ("connection refused", "down or not reachable from the node; check its address")),
    Fault("registry-unauthorized",
          lambda scene: scene.build("-t", f"{scene.registry}/app:1", "--push"), 8,
          ("docker login",)),
    Fault("dns-failure-in-from",
          lambda scene: scene.dockerfile("FROM registry.invalid/app:1\n"), 1,
          ("registry.invalid.*no such host", "check its spelling")),
    Fault("dns-failure-in-add",
          lambda scene: scene.dockerfile("FROM scratch\nADD http://files.invalid/x /x\n"), 1,
          ("files.invalid.*no such host", "check its spelling")),
    Fault("dockerfile-error", lambda scene: scene.dockerfile("FROM scratch\nCOPPY a b\n"), 1,
          ("Dockerfile:2", "unknown instruction: COPPY", "did you mean COPY")),
    Fault("secret-missing",
          lambda scene: scene.dockerfile(
              (scene.context / "Dockerfile").read_text()
              + "RUN --mount=type=secret,id=key,required=true cat /run/secrets/key\n"), 1,
          ("secret key: not found", "--secret id=key")),
    Fault("entitlement-unsupported",
          lambda scene: scene.dockerfile(
              (scene.context / "Dockerfile").read_text() + "RUN --security=insecure true\n"), 1,
          ("security.insecure.*not allowed", "--allow|policy")),
    Fault("entitlement-not-permitted", lambda scene: scene.build("--network=host"), 4,
          ("node-\\d does not permit it", "project_entitlements")),
    Fault("git-server-down",
          lambda scene: scene.build_path(f"http://{closed_port()}/app.git"), 1,
          ("127.0.0.1:\\d+ is down or not reachable from the node", "check its address")),
    Fault("ignore-file-wrong", lambda scene: scene.with_file(".dockerignore", b"[z-a\n"), 1,
          ("syntax error in pattern", "a pattern in .dockerignore")),
    Fault("name-not-utf8", lambda scene: scene.with_file(b"a\xff", b""), 1,
          ('name "a.xff" in the build context is not UTF-8', "rename it, or list it")),
    Fault("build-unknown", lambda scene: scene.offload("attach", "nosuch"), 5,
          ('there is no build "nosuch"', "offload builds$")),
    Fault("call-unknown", lambda scene: scene.build("--call=wish"), 1,
          ("frontend.wish", "check, outline and targets")),
    Fault("engine-missing", lambda scene: scene.build("--load"), 12,
          ("no-such-socket", "is docker running")),
    Fault("destination-missing", unknown_file_permission, 3, ("cannot write", "does not exist")),
    Fault("failing-step",
          lambda scene: scene.dockerfile(
              (scene.context / "Dockerfile").read_text() + "RUN echo why >&2; exit 3\n"), 1,
          ("exit code: 3", "why")),
    Fault("unknown-flag", lambda scene: scene.build("--frobnicate"), 125,
          ("unknown flag: --frobnicate", "--help")),
)  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running.address


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_told_at_once_with_cause_and_remedy(
    pool: Pool, member: Member, registry: str, fault: Fault, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        scene = Scene(pool, member, tmp_path, registry, stack)
        command = fault.make(scene)
        for attempt in range(TRIES):
            seconds, done = timed(command, scene.member)
            if seconds <= fault.seconds or attempt == TRIES - 1:
                break
    print(f"{fault.name}: {seconds:.2f} s\n{done.stderr}")
    check(done, fault.code, *fault.cause)
    assert seconds <= fault.seconds


def timed(command: Sequence[str], member: Member) -> tuple[float, subprocess.CompletedProcess[str]]:
    environment = {**member.environment, "DOCKER_HOST": f"unix://{member.home}/no-such-socket"}
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=60, check=False,
        env=environment, cwd=member.home, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return time.monotonic() - began, done


def check(done: subprocess.CompletedProcess[str], code: int, *expected: str) -> None:
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = done.stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR: ")]
    assert len(errors) == 1, done.stderr
    assert len(" ".join(lines[errors[0] :]).split()) <= WORDS_AT_MOST
    told = " ".join(lines[errors[0] :])
    assert told.count("check its") <= 1 and told.count("--secret id=") <= 2, "told twice"
    assert "ssl_transport_security" not in done.stderr
    for pattern in expected:
        assert re.search(pattern, done.stderr, re.IGNORECASE | re.DOTALL), (pattern, done.stderr)


async def test_full_queue_is_told_at_once(tmp_path: Path) -> None:
    async with RunningGateway(max_queued_builds=1) as gateway:
        member = nobody(gateway, tmp_path)
        waiting = member.start(make_context(tmp_path / "first"))
        try:
            await asyncio.to_thread(wait_for_text, waiting, "no node is attached")
            await told(member, tmp_path, 6, "wait", "again|later")
        finally:
            waiting.terminate()
            await asyncio.to_thread(waiting.communicate, timeout=20)


async def test_wait_for_a_node_ends_in_time(tmp_path: Path) -> None:
    async with RunningGateway(queue_timeout=0.5) as gateway:
        await told(nobody(gateway, tmp_path), tmp_path, 6, "no node is attached", "again|later")


def nobody(gateway: RunningGateway, work: Path) -> Member:
    """Return somebody with an empty home and a token."""
    home = work / "home"
    home.mkdir()
    return Member(home, {"OFFLOAD_TOKEN": gateway.admin_token, "OFFLOAD_GATEWAY": gateway.address})


async def told(member: Member, work: Path, code: int, *expected: str) -> None:
    """Build at a gateway without nodes."""
    context = make_context(work / "context")
    command = member.command("offload-build", "--progress", "plain", context)
    for _ in range(TRIES):
        seconds, done = await asyncio.to_thread(timed, command, member)
        if seconds <= AT_ONCE_SECONDS:
            break
    print(f"{seconds:.2f} s\n{done.stderr}")
    check(done, code, *expected)
    assert seconds <= AT_ONCE_SECONDS


def test_debug_shows_the_rest(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c")
    plain = member.build("--project", "nowhere", context)
    debug = member.build("--project", "nowhere", context, OFFLOAD_DEBUG="1")
    assert debug.returncode == plain.returncode == 5
    assert "Traceback" in debug.stderr
    assert len(debug.stderr) > len(plain.stderr)
