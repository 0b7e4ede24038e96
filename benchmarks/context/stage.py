"""What the cases of `context` share: two places with a link, one node, and who builds on it.

MinIO, gateway and node run at the builder's side. Commands run at the client's side, over the link,
or at the builder's own side, over its loopback. The peers reach the BuildKit of that node over TCP
with mutual TLS, as our client reaches the node.
"""

from __future__ import annotations

import shutil
import tarfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from benchmarks.buildkitport import open_port
from benchmarks.model import BenchmarkError
from benchmarks.peers import Buildx, buildctl
from benchmarks.pool import Pool
from tests.fixtures.minio import MinioServer
from tests.fixtures.ports import free_port
from tests.fixtures.wan import Wan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from benchmarks.buildkitport import BuildkitPort
    from benchmarks.commands import Finished, Place
    from benchmarks.pool import Member
    from benchmarks.session import Session

NODE = "node-1"
BUILDER = "peer"
BUILDX = "docker buildx, remote driver over mTLS"
BUILDCTL = "buildctl over mTLS"
WAN_BITS = 100e6
WAN_DELAY_SECONDS = 0.02
"""One way: 40 ms there and back."""
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Run:
    """One build: how long it took the user, and what left the client's side for it."""

    seconds: float
    sent_megabytes: float


@dataclass
class Stage:
    """A pool with one node; made by `open_stage`."""

    work: Path
    link: Wan
    pool: Pool
    port: BuildkitPort
    stack: ExitStack
    viewer: Member
    socket: str = ""
    """BuildKit's unix socket; empty until the first build has started it."""
    _names: set[str] = field(default_factory=set)

    @property
    def far(self) -> Place:
        """The client's side, behind the link."""
        return self.link.client.entered

    @property
    def near(self) -> Place:
        """The builder's own side."""
        return self.link.builder.entered

    def name(self, kind: str) -> str:
        """Return a name that was not used before."""
        name = f"{kind}-{len(self._names)}"
        self._names.add(name)
        return name

    def member(self, place: Place) -> Member:
        """Return a new person with an empty home."""
        return self.stack.enter_context(self.pool.member(self.name("m"), place))

    def runner(self, place: Place) -> Member:
        """Return a new pipeline with an empty home."""
        return self.stack.enter_context(self.pool.runner(self.name("r"), place))

    def buildx(self, place: Place, *, unix: bool = False) -> Callable[..., Finished]:
        """Return the `docker buildx build` of a new user.

        Args:
            place: where they sit.
            unix: use BuildKit's unix socket instead of the port.
        """
        user = Buildx(self.work / self.name("x"), place)
        if unix:
            user.create(BUILDER, self.socket)
        else:
            user.create(BUILDER, self.port.address, self.port.client)

        def build(context: Path, *arguments: str) -> Finished:
            return user.build(BUILDER, context, *arguments)

        return build

    def buildctl(self, place: Place, *, unix: bool = False) -> Callable[..., Finished]:
        """Return `buildctl build`; arguments as for `buildx`."""
        address, tls = (self.socket, None) if unix else (self.port.address, self.port.client)

        def build(context: Path, *arguments: str) -> Finished:
            return buildctl(self.work, address, context, *arguments, tls=tls, place=place)

        return build

    def rest(self) -> None:
        """Wait until nothing is left to do for the last build."""
        self.viewer.wait_published()
        self.pool.wait_quiet()

    def measure(self, build: Callable[[], Finished], check: Callable[[Finished], float]) -> Run:
        """Run a build and check that it did what is measured.

        What is sent until the builder rests is counted too, such as what a helper sends later.
        """
        before = self.link.client.counters()
        seconds = check(build())
        self.rest()
        sent = (self.link.client.counters() - before).sent_bytes
        return Run(seconds, sent / MEGABYTE)

    def require_same_result(
        self, context: Path, ours: Member, peer: Callable[..., Finished]
    ) -> None:
        """Check that both sides make the same files of a context.

        Raises:
            BenchmarkError: they do not.
        """
        found = []
        for name, build in (("ours.tar", ours.build), ("peer.tar", peer)):
            archive = self.work / name
            build(context, "-o", f"type=tar,dest={archive}")
            found.append(_content(archive))
            archive.unlink()
        self.rest()
        if not found[0] or found[0] != found[1]:
            raise BenchmarkError(f"ours and the peer's result of {context.name} differ")


@contextmanager
def open_stage(session: Session, name: str) -> Iterator[Stage]:
    """Start everything in a directory of its own; stop and delete it in the end."""
    session.note(f"starting MinIO, gateway and node for {name}")
    work = session.work / name
    work.mkdir()
    try:
        with ExitStack() as stack:
            link = stack.enter_context(Wan(rate_bits=None, delay_seconds=0.0))
            # Daemons are started, and asked whether they are ready, at the builder's side.
            stack.enter_context(link.builder.entered())
            host = link.builder.address
            port = open_port(work / "port", host, free_port())
            minio = stack.enter_context(MinioServer(work / "minio"))
            pool = stack.enter_context(Pool(work, minio, host=host, buildkitd=port.script))
            viewer = stack.enter_context(pool.member("viewer"))
            pool.start_node(NODE, viewer)
            stage = Stage(work, link, pool, port, stack, viewer)
            # The first build starts BuildKit.
            first = work / "first"
            first.mkdir()
            (first / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
            viewer.build(first)
            stage.socket = pool.buildkit(NODE)
            stage.rest()
            yield stage
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def slow_link(stage: Stage) -> Iterator[None]:
    """Give the link the rate and the delay of a WAN."""
    stage.link.shape(rate_bits=WAN_BITS, delay_seconds=WAN_DELAY_SECONDS)
    try:
        yield
    finally:
        stage.link.shape(rate_bits=None, delay_seconds=0.0)


def measure_all(
    session: Session,
    what: str,
    contestants: Mapping[str, Callable[[int], Run]],
    *,
    runs: int,
    warmups: int = 0,
) -> dict[str, list[Run]]:
    """Interleave builds as `Session.interleave` does, and return all that was measured."""
    kept: dict[str, list[Run]] = {name: [] for name in contestants}

    def keep(name: str, contestant: Callable[[int], Run]) -> Callable[[int], float]:
        def run(number: int) -> float:
            done = contestant(number)
            if done.sent_megabytes:
                session.note(f"{what}: {name} sent {done.sent_megabytes:.3f} MB")
            kept[name].append(done)
            return done.seconds

        return run

    timed = {name: keep(name, contestant) for name, contestant in contestants.items()}
    figures = session.interleave(what, timed, runs=runs, warmups=warmups)
    return {name: kept[name][-len(figures[name]) :] for name in contestants}


def seconds(runs: list[Run]) -> list[float]:
    """Return how long the runs took."""
    return [run.seconds for run in runs]


def megabytes(runs: list[Run]) -> list[float]:
    """Return what the runs sent."""
    return [run.sent_megabytes for run in runs]


def _content(archive: Path) -> dict[str, tuple[bytes, int, str]]:
    """Return type, mode and digest of what is in an archive; times differ and do not matter."""
    found = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isreg() else None
            digest = entry.linkname if file is None else sha256(file.read()).hexdigest()
            found[entry.name.strip("/")] = (entry.type, entry.mode, digest)
    return found
