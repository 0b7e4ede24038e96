"""Looking at 50,000 files of 8 KB of which none has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.commands import Finished
from benchmarks.context.stage import BUILDCTL, BUILDX, Run, measure_all, open_stage, seconds
from benchmarks.model import Case
from benchmarks.trees import write_equal_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.session import Session

FILES = 50_000
FILE_BYTES = 8192
RUNS = 6
OURS = "50,000 files, none changed, loopback"

CASES = (
    Case("scan-50k", OURS, BUILDCTL, goal=1.0),
    Case("scan-50k-buildx", OURS, BUILDX),
)


def scan(session: Session) -> None:
    """Measure the cases; the first round sends the files and is not counted."""
    with open_stage(session, "scan") as stage:
        tree = stage.work / "tree"
        write_equal_files(tree, files=FILES, file_bytes=FILE_BYTES, variant="scan")
        member = stage.member(stage.near)
        builds: dict[str, Callable[..., Finished]] = {
            "ours": member.build,
            "buildctl": stage.buildctl(stage.near),
        }
        if session.wants("scan-50k-buildx"):
            builds["buildx"] = stage.buildx(stage.near)
        for name, build in builds.items():
            session.note(f"sending 50,000 files for {name}")
            build(tree)
            stage.rest()
        member.wait_helper()

        def contestant(name: str) -> Callable[[int], Run]:
            return lambda _: stage.measure(lambda: builds[name](tree), Finished.require_cached)

        contestants = {name: contestant(name) for name in builds}
        found = measure_all(session, "scan-50k", contestants, runs=RUNS, warmups=1)
        session.report("scan-50k", seconds(found["ours"]), seconds(found["buildctl"]))
        if "buildx" in found:
            session.report("scan-50k-buildx", seconds(found["ours"]), seconds(found["buildx"]))
