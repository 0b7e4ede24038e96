"""A context that the builder has never seen: source code, and data that cannot be compressed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.commands import Finished
from benchmarks.context.stage import (
    BUILDX,
    MEGABYTE,
    Run,
    Stage,
    measure_all,
    megabytes,
    open_stage,
    seconds,
    slow_link,
)
from benchmarks.model import Case
from benchmarks.trees import write_noise, write_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from benchmarks.session import Session

SOURCE_FILES = 20_000
SOURCE_BYTES = 100 * MEGABYTE
SOURCE_BINARY_EVERY = 25
SOURCE_WAN_RATIO = 0.6
RANDOM_SIZES = {f"large{number}": 64 * MEGABYTE for number in range(8)} | {
    f"part{number:03}": MEGABYTE for number in range(488)
}
"""1 GB."""
RANDOM_WAN_RATIO = 1.02
SOURCE = "100 MB of source code in 20,000 files"
RANDOM = "1 GB of incompressible data in 496 files"
UNIX = "buildx on the unix socket, no TLS"


@dataclass(frozen=True)
class Kind:
    """What is sent.

    Attributes:
        name: as in the names of the cases.
        text: for people.
        write: writes a variant of it; returns the directory.
        wan_runs: counted rounds over the WAN.
        loopback_runs: counted rounds over loopback.
        few_files: what is sent is removed after each run, because it is large.
    """

    name: str
    text: str
    write: Callable[[Path, str], Path]
    wan_runs: int
    loopback_runs: int
    few_files: bool


def _write_source(folder: Path, variant: str) -> Path:
    return write_tree(
        folder,
        files=SOURCE_FILES,
        size_bytes=SOURCE_BYTES,
        variant=variant,
        binary_every=SOURCE_BINARY_EVERY,
    )


def _write_random(folder: Path, variant: str) -> Path:
    return write_noise(folder, RANDOM_SIZES, variant=variant)


KINDS = (
    Kind("first-source", SOURCE, _write_source, wan_runs=2, loopback_runs=4, few_files=False),
    Kind("first-random", RANDOM, _write_random, wan_runs=1, loopback_runs=2, few_files=True),
)
CASES = (
    Case("first-source-wan", SOURCE, BUILDX, goal=SOURCE_WAN_RATIO),
    Case("first-source-wan-bytes", SOURCE, BUILDX, unit="MB"),
    Case("first-source-loopback", SOURCE, BUILDX, goal=1.0),
    Case("first-source-loopback-unix", SOURCE, UNIX),
    Case("first-random-wan", RANDOM, BUILDX, goal=RANDOM_WAN_RATIO),
    Case("first-random-wan-bytes", RANDOM, BUILDX, unit="MB"),
    Case("first-random-loopback", RANDOM, BUILDX, goal=1.0),
    Case("first-random-loopback-unix", RANDOM, UNIX),
)


def first(session: Session) -> None:
    """Measure the cases; each group of rounds on empty daemons, as they take much disk."""
    for kind in KINDS:
        name = kind.name
        if session.wants(f"{name}-wan", f"{name}-wan-bytes"):
            with open_stage(session, f"{name}-wan") as stage:
                _wan(session, stage, kind)
        if session.wants(f"{name}-loopback", f"{name}-loopback-unix"):
            with open_stage(session, f"{name}-loopback") as stage:
                _loopback(session, stage, kind)


def _wan(session: Session, stage: Stage, kind: Kind) -> None:
    member, buildx = stage.member(stage.far), stage.buildx(stage.far)
    builds = {"ours": member.build, "buildx": buildx}
    _wake(stage, builds)
    member.wait_helper()
    case = f"{kind.name}-wan"
    with slow_link(stage):
        found = measure_all(session, case, _contestants(stage, kind, builds), runs=kind.wan_runs)
    session.report(case, seconds(found["ours"]), seconds(found["buildx"]))
    session.report(f"{case}-bytes", megabytes(found["ours"]), megabytes(found["buildx"]))


def _loopback(session: Session, stage: Stage, kind: Kind) -> None:
    member = stage.member(stage.near)
    builds = {"ours": member.build, "buildx": stage.buildx(stage.near)}
    case = f"{kind.name}-loopback"
    if session.wants(f"{case}-unix"):
        builds["buildx-unix"] = stage.buildx(stage.near, unix=True)
    _wake(stage, builds)
    member.wait_helper()
    found = measure_all(session, case, _contestants(stage, kind, builds), runs=kind.loopback_runs)
    session.report(case, seconds(found["ours"]), seconds(found["buildx"]))
    if "buildx-unix" in found:
        session.report(f"{case}-unix", seconds(found["ours"]), seconds(found["buildx-unix"]))


def _wake(stage: Stage, builds: Mapping[str, Callable[[Path], Finished]]) -> None:
    """Let everybody build something small: our helper starts, buildx writes its settings."""
    for build in builds.values():
        build(stage.work / "first")
    stage.rest()


def _contestants(
    stage: Stage, kind: Kind, builds: Mapping[str, Callable[[Path], Finished]]
) -> dict[str, Callable[[int], Run]]:
    """Return functions that send a tree which nobody has sent before."""

    def contestant(name: str) -> Callable[[int], Run]:
        def run(number: int) -> Run:
            folder = stage.work / f"{name}{number}"
            kind.write(folder, f"{kind.name}/{name}{number}")
            # What was written must not reach the disk while somebody is measured.
            os.sync()
            try:
                return stage.measure(lambda: builds[name](folder), Finished.require_executed)
            finally:
                if kind.few_files:
                    # Many are left for the end: ext4 passes over inodes that were freed within
                    # the last minutes one by one, and whoever makes files next would pay for it.
                    shutil.rmtree(folder)

        return run

    return {name: contestant(name) for name in builds}
