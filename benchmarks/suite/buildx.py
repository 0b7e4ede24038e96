"""`buildx`: stock docker buildx through the pool, and straight to the same BuildKit."""

from __future__ import annotations

import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.buildkitport import TlsFiles, open_port
from benchmarks.idleclients import IdleClients
from benchmarks.model import Benchmark, BenchmarkError, Case
from benchmarks.peers import Buildx, buildctl
from benchmarks.pool import Pool
from benchmarks.projects import add_busybox, small_project
from benchmarks.rss import PeakMemory
from benchmarks.settle import descendants
from benchmarks.trees import write_equal_files, write_noise
from tests.fixtures.minio import MinioServer
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.commands import Finished
    from benchmarks.pool import Member
    from benchmarks.session import Session

MEGABYTE = 1_000_000
POOL = "docker buildx through the pool"
PEER = "docker buildx straight to BuildKit over mTLS"
CONTEXT = Case("context-1gb", POOL, PEER, goal=1.25)
RESULT = Case("result-500mb", POOL, PEER)
SMALL = Case("small-files", POOL, PEER)
WARM = Case("warm-noop-added", "what the pool adds to a warm build", "", unit="ms", limit=40)
CONNECTIONS = Case(
    "connections", "gateway with 200 idle and 20 building clients", "", unit="MB", limit=150
)
NODE = "node-1"
OURS, THEIRS = "pool", "peer"
PLAIN = "--progress=plain"
MOUNTED = (
    "FROM scratch\nCOPY busybox /bin/busybox\n"
    'RUN --mount=type=bind,target=/context ["/bin/busybox", "true"]\n'
)
"""Reads the whole context and keeps nothing of it: neither a layer nor a cache has its bytes."""
CONTEXT_FILES = {f"part-{number}": 64 * MEGABYTE for number in range(16)}
RESULT_BYTES = 500 * MEGABYTE
SMALL_FILES = 20_000
SMALL_BYTES = 4096
IDLE, ACTIVE = 200, 20
ACTIVE_BYTES = 40 * MEGABYTE
_SENT = re.compile(r"transferring context: ([0-9.]+)([kMG]?)B")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Parts:
    """What runs.

    Attributes:
        pool: gateway and node.
        member: whose builder it is.
        ours: a user of buildx whose builder is the pool.
        theirs: one whose builder is the node's BuildKit.
        tls: what our user's clients show and trust.
    """

    pool: Pool
    member: Member
    ours: Buildx
    theirs: Buildx
    tls: TlsFiles

    def contestants(
        self, build: Callable[[Buildx, str], float]
    ) -> dict[str, Callable[[int], float]]:
        """Return both users, who build the same way."""

        def rested(user: Buildx, builder: str) -> float:
            seconds = build(user, builder)
            self.pool.wait_quiet()
            return seconds

        return {
            OURS: lambda _: rested(self.ours, OURS),
            THEIRS: lambda _: rested(self.theirs, THEIRS),
        }


def run(session: Session) -> None:
    """Measure the cases that the session wants."""
    with ExitStack() as stack:
        parts = _start(session, stack)
        if session.wants(WARM.name):
            _warm(session, parts)
        if session.wants(SMALL.name):
            tree = session.work / "small"
            write_equal_files(tree, files=SMALL_FILES, file_bytes=SMALL_BYTES, variant="small")
            _context(session, parts, SMALL, _mounted(tree), SMALL_FILES * SMALL_BYTES, runs=6)
        if session.wants(CONTEXT.name):
            tree = write_noise(session.work / "large", CONTEXT_FILES, variant="large")
            _context(session, parts, CONTEXT, _mounted(tree), sum(CONTEXT_FILES.values()), runs=6)
        if session.wants(RESULT.name):
            _result(session, parts)
        if session.wants(CONNECTIONS.name):
            _connections(session, parts)


def _start(session: Session, stack: ExitStack) -> Parts:
    session.note("starting MinIO, gateway and node")
    folder = session.work / "parts"
    folder.mkdir()
    minio = stack.enter_context(MinioServer(folder / "minio"))
    port = open_port(folder / "port", "127.0.0.1", free_port())
    pool = stack.enter_context(Pool(folder, minio, buildkitd=port.script))
    member = stack.enter_context(pool.member("one"))
    pool.start_node(NODE, member, slots=ACTIVE)
    ours, theirs = Buildx(folder / "ours"), Buildx(folder / "theirs")
    member.make_builder(OURS, ours.docker_config)
    theirs.create(THEIRS, port.address, port.client)
    # The first build starts the node's BuildKit.
    ours.build(OURS, small_project(folder / "first"))
    keys = member.builder_folder(OURS)
    tls = TlsFiles(keys / "ca.pem", keys / "client.pem", keys / "client.pem")
    return Parts(pool, member, ours, theirs, tls)


def _warm(session: Session, parts: Parts) -> None:
    context = small_project(session.work / "warm")

    def build(user: Buildx, builder: str) -> float:
        return user.build(builder, context, PLAIN).seconds

    parts.ours.build(OURS, context, PLAIN)
    parts.theirs.build(THEIRS, context, PLAIN).require_cached()
    found = session.interleave(WARM.name, parts.contestants(build), runs=16, warmups=2)
    ours, theirs = (1000 * statistics.median(found[name]) for name in (OURS, THEIRS))
    session.note(f"{WARM.name}: {ours:.0f} ms through the pool, {theirs:.0f} ms straight")
    session.report(WARM.name, [ours - theirs])


def _mounted(tree: Path) -> Path:
    """Make a tree a context that is read and not kept."""
    add_busybox(tree)
    (tree / "Dockerfile").write_text(MOUNTED)
    return tree


def _context(
    session: Session, parts: Parts, case: Case, tree: Path, size_bytes: int, *, runs: int
) -> None:
    """Measure builds whose whole context is sent, because all times in it are new."""

    def build(user: Buildx, builder: str) -> float:
        for path in tree.rglob("*"):
            if path.is_file() and path.name != "Dockerfile":
                path.touch()
        done = user.build(builder, tree, PLAIN)
        _require_sent(done, size_bytes)
        return done.seconds

    found = session.interleave(case.name, parts.contestants(build), runs=runs)
    session.report(case.name, found[OURS], found[THEIRS])


def _result(session: Session, parts: Parts) -> None:
    tree = write_noise(session.work / "result", {"data": RESULT_BYTES}, variant="result")
    copies = {}

    def build(user: Buildx, builder: str) -> float:
        target = session.work / f"{builder}.tar"
        done = user.build(builder, tree, PLAIN, "-o", f"type=tar,dest={target}")
        copies[builder] = target.stat().st_size
        target.unlink()
        if copies[builder] < RESULT_BYTES:
            raise BenchmarkError(f"the result has {copies[builder]} bytes only")
        return done.seconds

    # The first build of ours also exports the layer to the cache.
    found = session.interleave(RESULT.name, parts.contestants(build), runs=6)
    session.report(RESULT.name, found[OURS], found[THEIRS])


def _connections(session: Session, parts: Parts) -> None:
    trees = [
        _mounted(write_noise(session.work / f"active-{n}", {"d": ACTIVE_BYTES}, variant=f"a{n}"))
        for n in range(ACTIVE)
    ]
    gateway = parts.pool.gateway_pid()
    server_name = "default.buildkit.offload"
    address = f"tcp://{parts.pool.address}"

    def active(tree: Path) -> None:
        (tree / "d").touch()
        flag = "--tlsservername=" + server_name
        done = buildctl(session.work, address, tree, tls=parts.tls, flags=(flag,))
        _require_sent(done, ACTIVE_BYTES)

    def peak(_: int) -> float:
        with (
            IdleClients(parts.pool.address, server_name, parts.tls, IDLE) as idle,
            PeakMemory(lambda: descendants(gateway)) as memory,
            ThreadPoolExecutor(ACTIVE) as threads,
        ):
            list(threads.map(active, trees))
            time.sleep(1.0)
            idle.require_all()
        return memory.peak_bytes / MEGABYTE

    found = session.interleave(CONNECTIONS.name, {"gateway": peak}, runs=3)
    session.report(CONNECTIONS.name, found["gateway"])


def _require_sent(done: Finished, size_bytes: int) -> None:
    """Refuse a figure of a build that did not send its context.

    Raises:
        BenchmarkError: it did not.
    """
    sent = max((float(n) * _UNITS[unit] for n, unit in _SENT.findall(done.output)), default=0.0)
    if sent < 0.95 * size_bytes:
        raise BenchmarkError(f"only {sent / 1e6:.1f} MB were sent:\n{done.output}")


BENCHMARK = Benchmark(
    "buildx",
    "stock docker buildx through the pool against straight to the same BuildKit",
    (CONTEXT, RESULT, SMALL, WARM, CONNECTIONS),
    run,
)
