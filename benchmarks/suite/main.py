"""`main`: the main job. A warm build, a cold one, an image that comes back, a second node."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.model import Benchmark, BenchmarkError, Case
from benchmarks.onenode import BUILDER, BUILDX, start_parts, warm_contestants
from benchmarks.peers import buildctl
from benchmarks.poolhop import CASES as POOL_HOP_CASES
from benchmarks.poolhop import pool_hop
from benchmarks.projects import data_project, small_project
from tests.fixtures.engine import DockerEngine, StoreKind

if TYPE_CHECKING:
    from benchmarks.onenode import Parts
    from benchmarks.session import Session

WARM = (
    Case("warm-noop", "offload-build", BUILDX, goal=1.0),
    Case("warm-noop-buildctl", "offload-build", "buildctl"),
    Case("warm-noop-cold-cli", "offload-build without its helper, as in CI", BUILDX),
    Case("warm-noop-cold-cli-buildctl", "offload-build without its helper", "buildctl"),
)
COLD = (
    Case("cold-small", "offload-build", BUILDX),
    Case("cold-small-buildctl", "offload-build", "buildctl"),
)
LOAD = (
    Case("load-cached", "offload-build --load, containerd store", f"{BUILDX}, --load"),
    Case("load-cached-graphdriver", "offload-build --load, overlay2", f"{BUILDX}, --load"),
)
IMAGE_BYTES = 35_000_000
"""The image of the data project is larger than this, packed or not."""
STORES: tuple[StoreKind, ...] = ("containerd", "graphdriver")


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group on daemons of its own."""
    if session.wants(*(case.name for case in (*WARM, *COLD, *LOAD))):
        with ExitStack() as stack:
            _one_node(session, start_parts(session, stack))
    if session.wants(*(case.name for case in POOL_HOP_CASES)):
        pool_hop(session)


def _one_node(session: Session, parts: Parts) -> None:
    if session.wants(*(case.name for case in WARM)):
        _warm(session, parts)
    if session.wants(*(case.name for case in COLD)):
        _cold(session, parts)
    for case, kind in zip(LOAD, STORES, strict=True):
        if session.wants(case.name):
            _load(session, parts, case.name, kind)


def _warm(session: Session, parts: Parts) -> None:
    found = session.interleave("warm-noop", warm_contestants(session, parts), runs=16, warmups=2)
    session.report("warm-noop", found["ours"], found["buildx"])
    session.report("warm-noop-buildctl", found["ours"], found["buildctl"])
    session.report("warm-noop-cold-cli", found["cold-cli"], found["buildx"])
    session.report("warm-noop-cold-cli-buildctl", found["cold-cli"], found["buildctl"])


def _cold(session: Session, parts: Parts) -> None:
    context = small_project(session.work / "cold")

    def salt() -> None:
        # The first step copies it, so that no step is cached, for nobody.
        (context / "salt").write_text(secrets.token_hex(16))

    def ours(_: int) -> float:
        parts.member.wait_helper()
        salt()
        return parts.published(parts.member.build(context).require_executed())

    def buildx(_: int) -> float:
        salt()
        return parts.published(parts.buildx.build(BUILDER, context).require_executed())

    def plain_buildctl(_: int) -> float:
        salt()
        return parts.published(buildctl(session.work, parts.address, context).require_executed())

    found = session.interleave(
        "cold-small", {"ours": ours, "buildx": buildx, "buildctl": plain_buildctl}, runs=8
    )
    session.report("cold-small", found["ours"], found["buildx"])
    session.report("cold-small-buildctl", found["ours"], found["buildctl"])


def _load(session: Session, parts: Parts, case: str, kind: StoreKind) -> None:
    session.note(f"starting a docker engine with the {kind} store")
    context = session.work / "load"
    if not context.exists():
        data_project(context)
    with DockerEngine(kind) as engine:

        def ours(_: int) -> float:
            parts.member.wait_helper()
            done = parts.member.build(
                context, "--load", "-t", "bench:ours", docker_host=engine.host
            )
            return parts.published(done.seconds)

        def buildx(_: int) -> float:
            done = parts.buildx.build(
                BUILDER, context, "--load", "-t", "bench:buildx", docker_host=engine.host
            )
            return parts.published(done.seconds)

        # The warm-up brings the image into the engine; from then on it does not change.
        found = session.interleave(case, {"ours": ours, "buildx": buildx}, runs=8)
        for image in ("bench:ours", "bench:buildx"):
            # What was loaded is a whole image: reading all its layers works.
            done = engine.docker("save", image)
            if done.returncode != 0 or len(done.stdout) < IMAGE_BYTES:
                raise BenchmarkError(f"{image} is damaged: {done.stderr.decode(errors='replace')}")
    session.report(case, found["ours"], found["buildx"])


BENCHMARK = Benchmark(
    "main",
    "the main job on one node, and on a second, empty one",
    (*WARM, *COLD, *LOAD, *POOL_HOP_CASES),
    run,
)
