"""Two sides with nothing but a cache in S3: an empty node of ours, an empty buildkitd of the peer.

Both start their daemons before the clock does, except that our node starts its BuildKit during the
build, as it always does at the first build of a project.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.daemons import registry
from benchmarks.peers import Buildx, buildctl
from benchmarks.pool import Member, Pool
from benchmarks.settle import wait_quiet
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.session import Session

BUCKET = "peer"
OTHER = "Other.Dockerfile"
"""Another name than that of the measured project: the cache keeps builds apart by it."""


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
    def empty_node(self) -> Iterator[Path]:
        """Run the pool's only node, with nothing in it; return where its data is."""
        name = f"node-{self.number()}"
        self.pool.start_node(name, self.member)
        try:
            self.pool.wait_quiet()
            yield self.work / name
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

    def image(self) -> str:
        """Return the name of an image in a repository that the registry has not seen."""
        return f"{self.registry}/new{self.number()}/image:latest"

    def pushed(self, name: str = "") -> str:
        """Return the output of a peer that pushes an image, by default to a new repository."""
        return f"type=image,name={name or self.image()},push=true"

    def build_once(self) -> None:
        """Build on a first node of each side, with all caches written."""
        with self.empty_node():
            self.member.build(self.context).require_executed()
        with self.empty_buildkitd() as first:
            self.buildx.create("first", first.address)
            self.buildx.build(
                "first", self.context, "--cache-to", self.s3("mode=max")
            ).require_executed()


def open_stage(session: Session, stack: ExitStack, name: str, context: Path) -> Stage:
    """Start MinIO, a registry and a gateway; nodes come later.

    Args:
        session: the run.
        stack: ends them.
        name: of the directory for their data.
        context: what is built.
    """
    session.note(f"starting MinIO, registry and gateway for {name}")
    work = session.work / name
    work.mkdir()
    minio = stack.enter_context(MinioServer(work / "minio"))
    (minio.data_dir / BUCKET).mkdir()
    daemon, address = registry(work / "registry")
    stack.enter_context(daemon)
    pool = stack.enter_context(Pool(work, minio))
    member = stack.enter_context(pool.member("one"))
    buildx = Buildx(work / "buildx")
    stage = Stage(work, minio, pool, member, buildx, address, context, work / "other")
    stage.other.mkdir()
    (stage.other / OTHER).write_text("FROM scratch\nCOPY file /\n")
    (stage.other / "file").write_text("nothing in common")
    return stage
