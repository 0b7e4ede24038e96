"""How much memory our client and our node take for one huge file, and for very many small ones.

Client: the command and all that it starts, and the resident helper that works for it. Node: the
agent and all that it starts, without BuildKit. Figures are the highest sum of resident memory, seen
every 20 ms, less what was resident after a small build and before this one.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from benchmarks.context.stage import MEGABYTE, NODE, Stage, open_stage
from benchmarks.model import BenchmarkError, Case
from benchmarks.projects import add_busybox
from benchmarks.rss import PeakMemory, resident_bytes
from benchmarks.settle import children, descendants
from benchmarks.trees import write_equal_files, write_noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

CLIENT_MEGABYTES = 150.0
NODE_MEGABYTES = 250.0
HUGE_BYTES = 10_000 * MEGABYTE
HUGE_FREE_BYTES = 45_000 * MEGABYTE
"""The file itself, the node's copy, BuildKit's, and that of the shared store."""
SMALL_FILES = 200_000
SMALL_FILE_BYTES = 1200
DOCKERFILE = """\
FROM scratch AS base
COPY busybox /bin/busybox

FROM base
RUN --mount=type=bind,target=/context ["/bin/busybox", "ls", "/context"]
"""
"""Needs the whole context and copies none of it into a layer, which would only take disk."""
BUILDKITD = "buildkitd"

CASES = (
    Case("memory-client-10g", "client, a file of 10 GB", "", unit="MB", limit=CLIENT_MEGABYTES),
    Case("memory-node-10g", "node, a file of 10 GB", "", unit="MB", limit=NODE_MEGABYTES),
    Case("memory-client-200k", "client, 200,000 files", "", unit="MB", limit=CLIENT_MEGABYTES),
    Case("memory-node-200k", "node, 200,000 files", "", unit="MB", limit=NODE_MEGABYTES),
)


def memory(session: Session) -> None:
    """Measure the cases; each context with daemons that have done nothing before."""
    for name, write in (("10g", _write_huge), ("200k", _write_many)):
        if session.wants(f"memory-client-{name}", f"memory-node-{name}"):
            with open_stage(session, f"memory-{name}") as stage:
                _measure(session, stage, name, write)


def _measure(session: Session, stage: Stage, name: str, write: Callable[[Path], None]) -> None:
    session.note(f"writing the context of memory-{name}")
    tree = stage.work / "tree"
    write(tree)
    add_busybox(tree)
    os.sync()
    member = stage.member(stage.near)
    member.build(stage.work / "first")
    member.wait_helper()
    stage.rest()
    helper, node = member.helper_pid(), stage.pool.node_pid(NODE)
    here = os.getpid()
    others = set(children(here))

    def client() -> list[int]:
        mine = [child for child in children(here) if child not in others]
        return [pid for root in (helper, *mine) for pid in descendants(root)]

    def agent() -> list[int]:
        return descendants(node, without=(BUILDKITD,))

    idle = resident_bytes(client()), resident_bytes(agent())
    with PeakMemory(client) as client_peak, PeakMemory(agent) as agent_peak:
        done = member.build(tree)
    done.require_executed()
    peaks = client_peak.peak_bytes, agent_peak.peak_bytes
    grown = [(peak - before) / MEGABYTE for peak, before in zip(peaks, idle, strict=True)]
    session.note(
        f"memory-{name}: client {idle[0] / MEGABYTE:.0f} + {grown[0]:.0f} MB, "
        f"node {idle[1] / MEGABYTE:.0f} + {grown[1]:.0f} MB, {done.seconds:.1f} s"
    )
    session.report(f"memory-client-{name}", [grown[0]])
    session.report(f"memory-node-{name}", [grown[1]])


def _write_huge(tree: Path) -> None:
    free = shutil.disk_usage(tree.parent).free
    if free < HUGE_FREE_BYTES:
        raise BenchmarkError(
            f"memory-*-10g need {HUGE_FREE_BYTES / 1e9:.0f} GB of free disk at {tree.parent}; "
            f"there are {free / 1e9:.0f}"
        )
    write_noise(tree, {"huge.bin": HUGE_BYTES}, variant="huge", dockerfile=DOCKERFILE)


def _write_many(tree: Path) -> None:
    write_equal_files(
        tree,
        files=SMALL_FILES,
        file_bytes=SMALL_FILE_BYTES,
        variant="many",
        dockerfile=DOCKERFILE,
    )
