"""Cases `pool-hop*`: the team has built this before, elsewhere; here is an empty node.

Ours: a node with an empty data directory joins the pool; the node that had built is gone. Peer: a
buildkitd with an empty directory and `--cache-from type=s3`, on the same MinIO, in which
`--cache-to type=s3,mode=max` of an earlier build has left its cache. Both start their daemons
before the clock does, except that our node starts its BuildKit during the build, as it always does
at the first build of a project; in `pool-hop-running` an unrelated build has done so before.

`pool-hop` begins with a cache and nothing else, and ends with an image that can be pulled from a
registry: ours from the pool's, the peer's from a docker registry that has not seen the image.
In `pool-hop-again` that registry has all layers from an earlier push.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.daemons import registry
from benchmarks.model import Case
from benchmarks.peers import Buildx, buildctl
from benchmarks.pool import Member, Pool
from benchmarks.projects import data_project
from benchmarks.settle import wait_quiet
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.session import Session

RUNS = 6
PEER = "buildx type=s3"
BUCKET = "peer"
OTHER = "Other.Dockerfile"
"""Another name than that of the measured project: the cache keeps builds apart by it."""

CASES = (
    Case("pool-hop", "image to the pool's registry", f"{PEER}, image to a registry", goal=0.5),
    Case("pool-hop-buildctl", "image to the pool's registry", "buildctl type=s3, to a registry"),
    Case(
        "pool-hop-running",
        "the same, BuildKit of the node already runs",
        f"{PEER}, image to a registry",
    ),
    Case(
        "pool-hop-again",
        "image to the pool's registry",
        f"{PEER}, image to a registry that has its layers",
    ),
    Case("pool-hop-push", "--push to a new repository", f"{PEER}, --push to a new repository"),
    Case("pool-hop-oci", "-o type=oci to a file", f"{PEER}, -o type=oci to a file"),
)


@dataclass
class Stage:
    """What all rounds share."""

    work: Path
    minio: MinioServer
    pool: Pool
    member: Member
    buildx: Buildx
    registry: str
    context: Path
    other: Path
    count: int = field(default=0)

    def number(self) -> int:
        """Return a number that was not used before."""
        self.count += 1
        return self.count

    def s3(self, *more: str) -> str:
        """Return the attributes of BuildKit's own S3 cache."""
        return ",".join(
            (
                "type=s3",
                "region=us-east-1",
                f"endpoint_url={self.minio.endpoint_url}",
                f"bucket={BUCKET}",
                "use_path_style=true",
                f"access_key_id={self.minio.access_key}",
                f"secret_access_key={self.minio.secret_key}",
                "name=team",
                *more,
            )
        )

    @contextmanager
    def empty_buildkitd(self) -> Iterator[Buildkitd]:
        """Run a buildkitd with nothing in it."""
        root = self.work / f"bk{self.number()}"
        try:
            with Buildkitd(root) as daemon:
                wait_quiet([daemon.pid])
                yield daemon
        finally:
            shutil.rmtree(root, ignore_errors=True)

    @contextmanager
    def empty_node(self) -> Iterator[None]:
        """Run the pool's only node, with nothing in it."""
        name = f"node-{self.number()}"
        self.pool.start_node(name, self.member)
        try:
            self.pool.wait_quiet()
            yield
            self.member.wait_published()
        finally:
            self.pool.stop_node(name, self.member)
            shutil.rmtree(self.work / name, ignore_errors=True)

    def ours(self, *arguments: str, running: bool = False) -> float:
        """Build on an empty node; return the seconds.

        Args:
            arguments: of offload-build.
            running: wake the node's BuildKit first, by a build that has nothing in common.
        """
        self.member.wait_helper()
        with self.empty_node():
            if running:
                self.member.build(self.other, "-f", str(self.other / OTHER))
                self.member.wait_published()
                self.pool.wait_quiet()
            return self.member.build(self.context, *arguments).require_cached()

    def peer(self, *arguments: str) -> float:
        """Build with buildx on an empty buildkitd; return the seconds."""
        with self.empty_buildkitd() as daemon:
            builder = f"hop-{self.number()}"
            self.buildx.create(builder, daemon.address)
            done = self.buildx.build(builder, self.context, "--cache-from", self.s3(), *arguments)
            return done.require_cached()

    def peer_buildctl(self, *arguments: str) -> float:
        """Build with buildctl on an empty buildkitd; return the seconds."""
        with self.empty_buildkitd() as daemon:
            done = buildctl(
                self.work, daemon.address, self.context, "--import-cache", self.s3(), *arguments
            )
            return done.require_cached()


def pool_hop(session: Session) -> None:
    """Measure the cases."""
    with ExitStack() as stack:
        stage = _stage(session, stack)

        def new() -> str:
            return f"{stage.registry}/new{stage.number()}/image:latest"

        def pushed(name: str) -> str:
            return f"type=image,name={name},push=true"

        def to_pool(_: int) -> float:
            return stage.ours("-t", "team/image")

        if session.wants("pool-hop", "pool-hop-buildctl", "pool-hop-running"):
            contestants: dict[str, Callable[[int], float]] = {
                "ours": to_pool,
                "running": lambda _: stage.ours("-t", "team/image", running=True),
                "buildx": lambda _: stage.peer("-o", pushed(new())),
                "buildctl": lambda _: stage.peer_buildctl("--output", pushed(new())),
            }
            found = session.interleave("pool-hop", contestants, runs=RUNS)
            session.report("pool-hop", found["ours"], found["buildx"])
            session.report("pool-hop-buildctl", found["ours"], found["buildctl"])
            session.report("pool-hop-running", found["running"], found["buildx"])
        # The warm-up pushes it for the first time.
        known = new()
        archive = stage.work / "image.tar"
        pairs: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
            "pool-hop-again": (to_pool, lambda _: stage.peer("-o", pushed(known))),
            "pool-hop-push": (
                lambda _: stage.ours("--push", "-t", new()),
                lambda _: stage.peer("--push", "-t", new()),
            ),
            "pool-hop-oci": (
                lambda _: stage.ours("-o", f"type=oci,dest={archive}"),
                lambda _: stage.peer("-o", f"type=oci,dest={archive}"),
            ),
        }
        for case, (ours, buildx) in pairs.items():
            if session.wants(case):
                found = session.interleave(case, {"ours": ours, "buildx": buildx}, runs=RUNS)
                session.report(case, found["ours"], found["buildx"])


def _stage(session: Session, stack: ExitStack) -> Stage:
    session.note("starting MinIO, registry and gateway for pool-hop")
    work = session.work / "hop"
    work.mkdir()
    minio = stack.enter_context(MinioServer(work / "minio"))
    (minio.data_dir / BUCKET).mkdir()
    daemon, address = registry(work / "registry")
    stack.enter_context(daemon)
    pool = stack.enter_context(Pool(work, minio))
    member = stack.enter_context(pool.member("one"))
    stage = Stage(
        work,
        minio,
        pool,
        member,
        Buildx(work / "buildx"),
        address,
        data_project(session.work / "hop-project"),
        work / "other",
    )
    stage.other.mkdir()
    (stage.other / OTHER).write_text("FROM scratch\nCOPY file /\n")
    (stage.other / "file").write_text("nothing in common")
    session.note("building once on a first node of each side, with all caches written")
    with stage.empty_node():
        member.build(stage.context).require_executed()
    with stage.empty_buildkitd() as first:
        stage.buildx.create("first", first.address)
        stage.buildx.build(
            "first", stage.context, "--cache-to", stage.s3("mode=max")
        ).require_executed()
    return stage
