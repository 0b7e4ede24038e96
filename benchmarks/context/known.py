"""A context whose content the builder knows, or knows but for one file: 102 MB in 3,000 files."""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING

from benchmarks.commands import Finished
from benchmarks.context.stage import (
    BUILDX,
    Run,
    Stage,
    measure_all,
    megabytes,
    open_stage,
    seconds,
    slow_link,
)
from benchmarks.model import Case
from benchmarks.trees import clone, write_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

FILES = 3000
TREE_BYTES = 102_000_000
BINARY_EVERY = 5
KNOWN_MEGABYTES = 0.5
KNOWN_RATIO = 0.15
CHANGED_BYTES = 20_000
CHANGED_MEGABYTES = 0.32
"""The file, and 0.3 MB for everything else."""
CHANGED_FILE = "changed.bin"
RUNS = 3
UNCHANGED_RUNS = 6

KINDS = {
    "fresh-clone": "the same tree elsewhere, with new times",
    "teammate": "the same directory, another user",
    "other-directory": "a copy with its times under another name",
    "ci-runner": "a fresh clone by a pipeline with an empty home",
}
CASES = (
    *(
        case
        for kind, text in KINDS.items()
        for case in (
            Case(f"{kind}-bytes", text, BUILDX, unit="MB", limit=KNOWN_MEGABYTES),
            Case(f"{kind}-wan", text, BUILDX, goal=KNOWN_RATIO),
        )
    ),
    Case("unchanged", "the same directory again, WAN", BUILDX, goal=1.0),
    Case("unchanged-bytes", "the same directory again", BUILDX, goal=1.0, unit="MB"),
    Case("unchanged-loopback", "the same directory again, loopback", BUILDX),
    Case("one-file-changed", "20 KB changed", BUILDX, unit="MB", limit=CHANGED_MEGABYTES),
    Case("one-file-changed-wan", "20 KB changed", BUILDX),
)

Build = tuple["Callable[[Path], Finished]", "Path"]


def known(session: Session) -> None:
    """Measure the cases."""
    with open_stage(session, "known") as stage:
        tree = stage.work / "project" / "app"
        write_tree(
            tree, files=FILES, size_bytes=TREE_BYTES, variant="known", binary_every=BINARY_EVERY
        )
        (tree / CHANGED_FILE).write_bytes(secrets.token_bytes(CHANGED_BYTES))
        _Known(session, stage, tree).run()


class _Known:
    """The tree was built once by somebody; then others come."""

    def __init__(self, session: Session, stage: Stage, tree: Path) -> None:
        self._session = session
        self._stage = stage
        self._tree = tree
        self._ours = stage.member(stage.far)
        self._buildx = stage.buildx(stage.far)
        self._copies: dict[object, Path] = {}

    def run(self) -> None:
        session, stage = self._session, self._stage
        session.note("building the tree once on both sides, and comparing the results")
        stage.measure(lambda: self._ours.build(self._tree), Finished.require_executed)
        stage.measure(lambda: self._buildx(self._tree), Finished.require_cached)
        stage.require_same_result(self._tree, self._ours, self._buildx)
        self._ours.wait_helper()
        with slow_link(stage):
            for kind in KINDS:
                if session.wants(f"{kind}-bytes", f"{kind}-wan"):
                    self._kind(kind)
            if session.wants("unchanged", "unchanged-bytes"):
                found = self._again("unchanged", self._ours.build, self._buildx)
                session.report("unchanged", seconds(found["ours"]), seconds(found["buildx"]))
                session.report(
                    "unchanged-bytes", megabytes(found["ours"]), megabytes(found["buildx"])
                )
            if session.wants("one-file-changed", "one-file-changed-wan"):
                self._one_file()
        if session.wants("unchanged-loopback"):
            near = stage.member(stage.near)
            found = self._again("unchanged-loopback", near.build, stage.buildx(stage.near))
            session.report("unchanged-loopback", seconds(found["ours"]), seconds(found["buildx"]))

    def _kind(self, kind: str) -> None:
        def ours(number: int) -> Run:
            build, context = self._our_build(kind, number)
            return self._stage.measure(lambda: build(context), Finished.require_cached)

        def buildx(number: int) -> Run:
            build, context = self._peer_build(kind, number)
            return self._stage.measure(lambda: build(context), Finished.require_cached)

        found = measure_all(self._session, kind, {"ours": ours, "buildx": buildx}, runs=RUNS)
        self._session.report(f"{kind}-bytes", megabytes(found["ours"]), megabytes(found["buildx"]))
        self._session.report(f"{kind}-wan", seconds(found["ours"]), seconds(found["buildx"]))
        self._drop_copies()

    def _our_build(self, kind: str, number: int) -> Build:
        stage = self._stage
        if kind == "teammate":
            return stage.member(stage.far).build, self._tree
        if kind == "ci-runner":
            return stage.runner(stage.far).build, self._copy(kind, number)
        return self._ours.build, self._copy(kind, number)

    def _peer_build(self, kind: str, number: int) -> Build:
        stage = self._stage
        if kind == "teammate":
            return stage.buildx(stage.far), self._tree
        if kind == "ci-runner":
            return stage.buildx(stage.far), self._copy(kind, number)
        return self._buildx, self._copy(kind, number)

    def _copy(self, kind: str, number: int) -> Path:
        """Return the copy of this round; both sides build the same one."""
        if (kind, number) not in self._copies:
            self._drop_copies()
            keep_times = kind == "other-directory"
            name = f"tree{number}" if keep_times else self._tree.name
            target = self._stage.work / f"{kind}{number}" / name
            self._copies[kind, number] = clone(self._tree, target, keep_times=keep_times)
        return self._copies[kind, number]

    def _drop_copies(self) -> None:
        for copy in self._copies.values():
            shutil.rmtree(copy.parent)
        self._copies.clear()

    def _again(
        self,
        what: str,
        ours: Callable[[Path], Finished],
        buildx: Callable[[Path], Finished],
    ) -> dict[str, list[Run]]:
        stage, tree = self._stage, self._tree
        return measure_all(
            self._session,
            what,
            {
                "ours": lambda _: stage.measure(lambda: ours(tree), Finished.require_cached),
                "buildx": lambda _: stage.measure(lambda: buildx(tree), Finished.require_cached),
            },
            runs=UNCHANGED_RUNS,
            warmups=2,
        )

    def _one_file(self) -> None:
        stage, tree = self._stage, self._tree

        def changed(build: Callable[[Path], Finished]) -> Run:
            (tree / CHANGED_FILE).write_bytes(secrets.token_bytes(CHANGED_BYTES))
            return stage.measure(lambda: build(tree), Finished.require_executed)

        found = measure_all(
            self._session,
            "one-file-changed",
            {
                "ours": lambda _: changed(self._ours.build),
                "buildx": lambda _: changed(self._buildx),
            },
            runs=RUNS,
            warmups=1,
        )
        report = self._session.report
        report("one-file-changed", megabytes(found["ours"]), megabytes(found["buildx"]))
        report("one-file-changed-wan", seconds(found["ours"]), seconds(found["buildx"]))
