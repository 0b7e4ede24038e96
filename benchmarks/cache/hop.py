"""An empty second node: everything cached, and all but the last step."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.emptynodes import BUCKET, Stage, open_stage
from benchmarks.model import Case
from benchmarks.projects import layers_project

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

RUNS = 4
PEER = "buildx, type=s3"
LAYER_BYTES = 100_000
"""Manifests and configurations are smaller than this, and layers of the project larger."""

CASES = (
    Case("hop-unchanged", "image to the pool's registry", f"{PEER}, to a registry", goal=0.3),
    Case(
        "hop-unchanged-running",
        "the same, BuildKit of the node already runs",
        f"{PEER}, to a registry",
    ),
    Case("hop-unchanged-bytes", "layers that moved to the node", "", unit="MB", limit=0.0),
    Case("hop-last-step", "image to the pool's registry", f"{PEER}, to a registry", goal=0.8),
    Case("stored-bytes", "the cache of one build in the bucket", PEER, goal=0.9, unit="MB"),
)


def hop(session: Session) -> None:
    """Measure the cases."""
    with ExitStack() as stack:
        context = layers_project(session.work / "layers-project")
        stage = open_stage(session, stack, "layers", context)
        session.note("building once on a first node of each side, with all caches written")
        stage.build_once()
        if session.wants("stored-bytes"):
            ours = stage.minio.data_dir / "offload" / "projects" / "default" / "blobs"
            peer = stage.minio.data_dir / BUCKET / "blobs"
            session.report("stored-bytes", [_megabytes(ours)], [_megabytes(peer)])
        if session.wants("hop-unchanged", "hop-unchanged-running", "hop-unchanged-bytes"):
            moved: list[float] = []
            found = session.interleave(
                "hop-unchanged",
                {
                    "ours": lambda _: _unchanged(stage, moved),
                    "running": lambda _: stage.ours("-t", "team/image", running=True),
                    "buildx": lambda _: stage.peer("-o", stage.pushed()),
                },
                runs=RUNS,
            )
            session.report("hop-unchanged", found["ours"], found["buildx"])
            session.report("hop-unchanged-running", found["running"], found["buildx"])
            session.report("hop-unchanged-bytes", moved)
        if session.wants("hop-last-step"):

            def change() -> None:
                (context / "last").write_text(secrets.token_hex(16))

            def ours(_: int) -> float:
                change()
                with stage.empty_node():
                    return stage.member.build(context, "-t", "team/image").require_some_cached()

            def buildx(_: int) -> float:
                change()
                with stage.empty_buildkitd() as daemon:
                    builder = f"last-{stage.number()}"
                    stage.buildx.create(builder, daemon.address)
                    done = stage.buildx.build(
                        builder, context, "--cache-from", stage.s3(), "-o", stage.pushed()
                    )
                    return done.require_some_cached()

            found = session.interleave("hop-last-step", {"ours": ours, "buildx": buildx}, runs=RUNS)
            session.report("hop-last-step", found["ours"], found["buildx"])


def _unchanged(stage: Stage, moved: list[float]) -> float:
    """Build on an empty node, and note the layers that it has afterwards."""
    stage.member.wait_helper()
    with stage.empty_node() as folder:
        seconds = stage.member.build(stage.context, "-t", "team/image").require_cached()
        moved.append(_megabytes(folder, larger_than=LAYER_BYTES))
    return seconds


def _megabytes(folder: Path, *, larger_than: int = 0) -> float:
    """Return the bytes of the files of blobs below a folder, in units of 10^6."""
    files = (path for path in folder.rglob("*") if "blobs" in path.parts and path.is_file())
    sizes = (path.stat().st_size for path in files)
    return sum(size for size in sizes if size > larger_than) / 1e6
