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

from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.emptynodes import open_stage
from benchmarks.model import Case
from benchmarks.projects import data_project

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.session import Session

RUNS = 6
PEER = "buildx type=s3"

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


def pool_hop(session: Session) -> None:
    """Measure the cases."""
    with ExitStack() as stack:
        stage = open_stage(session, stack, "hop", data_project(session.work / "hop-project"))
        session.note("building once on a first node of each side, with all caches written")
        stage.build_once()

        def to_pool(_: int) -> float:
            return stage.ours("-t", "team/image")

        if session.wants("pool-hop", "pool-hop-buildctl", "pool-hop-running"):
            contestants: dict[str, Callable[[int], float]] = {
                "ours": to_pool,
                "running": lambda _: stage.ours("-t", "team/image", running=True),
                "buildx": lambda _: stage.peer("-o", stage.pushed()),
                "buildctl": lambda _: stage.peer_buildctl("--output", stage.pushed()),
            }
            found = session.interleave("pool-hop", contestants, runs=RUNS)
            session.report("pool-hop", found["ours"], found["buildx"])
            session.report("pool-hop-buildctl", found["ours"], found["buildctl"])
            session.report("pool-hop-running", found["running"], found["buildx"])
        # The warm-up pushes it for the first time.
        known = stage.image()
        archive = stage.work / "image.tar"
        pairs: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
            "pool-hop-again": (to_pool, lambda _: stage.peer("-o", stage.pushed(known))),
            "pool-hop-push": (
                lambda _: stage.ours("--push", "--provenance=false", "-t", stage.image()),
                lambda _: stage.peer("--push", "-t", stage.image()),
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
