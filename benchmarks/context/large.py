"""One large file of which a little changes: 1 MB within 500 MB."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.commands import Finished
from benchmarks.context.stage import BUILDX, MEGABYTE, Run, measure_all, megabytes, open_stage
from benchmarks.model import Case
from benchmarks.trees import Keystream, change_middle, write_noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

FILE_BYTES = 500 * MEGABYTE
CHANGED_BYTES = MEGABYTE
CHANGED_MEGABYTES = 8.0
MODEL = "model.bin"
RUNS = 2
"""The change is written over what is there in one of them, and put in between in the other."""

CASES = (
    Case("large-file-changed", "1 MB of 500 changed", BUILDX, unit="MB", limit=CHANGED_MEGABYTES),
)


def large(session: Session) -> None:
    """Measure the cases."""
    with open_stage(session, "large") as stage:
        member, buildx = stage.member(stage.far), stage.buildx(stage.far)
        # One directory each: a side must meet its own change only.
        builds = {"ours": member.build, "buildx": buildx}
        trees = {
            name: write_noise(stage.work / f"{name}-tree", {MODEL: FILE_BYTES}, variant=name)
            for name in builds
        }
        session.note("building 500 MB once on each side")
        for name, tree in trees.items():
            _build(builds[name], tree)
            stage.rest()
        changes = Keystream("changes")

        def changed(name: str) -> Callable[[int], Run]:
            def run(number: int) -> Run:
                data = changes.read(CHANGED_BYTES)
                change_middle(trees[name] / MODEL, data, insert=bool(number % 2))
                return stage.measure(lambda: builds[name](trees[name]), Finished.require_executed)

            return run

        contestants = {name: changed(name) for name in builds}
        found = measure_all(session, "large-file-changed", contestants, runs=RUNS)
        session.report("large-file-changed", megabytes(found["ours"]), megabytes(found["buildx"]))


def _build(build: Callable[[Path], Finished], tree: Path) -> None:
    build(tree).require_executed()
