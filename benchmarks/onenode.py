"""One node's BuildKit, and everybody who builds on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers import Buildx, buildctl
from benchmarks.pool import Member, Pool
from benchmarks.projects import small_project
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from benchmarks.session import Session

BUILDX = "docker buildx, remote driver"
NODE = "node-1"
BUILDER = "peer"


@dataclass(frozen=True)
class Parts:
    """What runs.

    Attributes:
        pool: gateway and node.
        member: our user.
        buildx: a user of buildx, whose builder `BUILDER` is the node's BuildKit.
        address: of that BuildKit.
    """

    pool: Pool
    member: Member
    buildx: Buildx
    address: str

    def rested(self, seconds: float) -> float:
        """Return a figure when gateway and node rest again."""
        self.pool.wait_quiet()
        return seconds

    def published(self, seconds: float) -> float:
        """Return a figure when our cache is published, too.

        That happens after the user has the result. The next run must not pay for it.
        """
        self.member.wait_published()
        return self.rested(seconds)


def start_parts(session: Session, stack: ExitStack, *, isolation: str = "none") -> Parts:
    """Start everything; `stack` ends it.

    Args:
        session: of the benchmark.
        stack: whatever was started ends with it.
        isolation: of the node: "none" or "netns".
    """
    session.note("starting MinIO, gateway and node")
    folder = session.work / isolation
    folder.mkdir()
    minio = stack.enter_context(MinioServer(folder / "minio"))
    pool = stack.enter_context(Pool(folder, minio))
    member = stack.enter_context(pool.member("one"))
    pool.start_node(NODE, member, isolation=isolation)
    # The first build starts the node's BuildKit and the member's helper.
    member.build(small_project(folder / "first"))
    member.wait_helper()
    address = pool.buildkit(NODE)
    buildx = Buildx(folder / "buildx")
    buildx.create(BUILDER, address)
    return Parts(pool, member, buildx, address)


def warm_contestants(session: Session, parts: Parts) -> dict[str, Callable[[int], float]]:
    """Return who builds a project of which every step is cached."""
    context = small_project(session.work / "warm")
    parts.member.build(context)
    parts.member.wait_published()
    home = session.work

    def ours(_: int) -> float:
        parts.member.wait_helper()
        return parts.rested(parts.member.build(context).require_cached())

    def cold_cli(_: int) -> float:
        return parts.rested(parts.member.build(context, helper=False).require_cached())

    def buildx(_: int) -> float:
        return parts.rested(parts.buildx.build(BUILDER, context).require_cached())

    def plain_buildctl(_: int) -> float:
        return parts.rested(buildctl(home, parts.address, context).require_cached())

    return {"ours": ours, "cold-cli": cold_cli, "buildx": buildx, "buildctl": plain_buildctl}
