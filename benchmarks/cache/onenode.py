"""One node: what the cache costs a warm build, a cold one, and eight at a time."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.emptynodes import Stage, open_stage
from benchmarks.model import BenchmarkError, Case
from benchmarks.projects import layers_project, small_project

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.session import Session

PEER = "buildx, type=s3 on the same BuildKit"
OFF = ("--cache-from", "type=none", "--cache-to", "type=none")
BUILDS = 8

CASES = (
    Case("warm-with-cache", "all cached, warm node", f"{PEER}, both ways", goal=1.0),
    Case("warm-without-cache", "all cached, warm node", "the same with the cache off", goal=1.05),
    Case("warm-imported", "with what another node has added", "the same with the cache off"),
    Case("cold-export", "image in the pool's registry", f"{PEER}, image in a registry", goal=0.7),
    Case("parallel-8", "eight builds, one scope", f"{PEER}, one name", goal=1.0),
)


def one_node(session: Session) -> None:
    """Measure the cases."""
    with ExitStack() as stack:
        stage = open_stage(session, stack, "onenode", layers_project(session.work / "one-project"))
        name = "node-one"
        stage.pool.start_node(name, stage.member)
        stage.member.build(stage.other, "-f", str(stage.other / "Other.Dockerfile"))
        stage.member.wait_helper()
        stage.buildx.create("same", stage.pool.buildkit(name))
        bench = _OneNode(session, stage)
        if session.wants("warm-with-cache", "warm-without-cache"):
            bench.warm()
        if session.wants("cold-export"):
            bench.cold()
        if session.wants("parallel-8"):
            bench.parallel(name)
        if session.wants("warm-imported"):
            bench.imported(name)


class _OneNode:
    def __init__(self, session: Session, stage: Stage) -> None:
        self._session = session
        self._stage = stage
        self._cache = (
            "--cache-from", stage.s3(), "--cache-to", stage.s3("mode=max"),
        )  # fmt: skip

    def _rested(self, seconds: float) -> float:
        self._stage.member.wait_published()
        self._stage.pool.wait_quiet()
        return seconds

    def _built(self, *arguments: str) -> float:
        stage = self._stage
        stage.member.wait_helper()
        return self._rested(stage.member.build(stage.context, *arguments).require_cached())

    def warm(self) -> None:
        stage, context = self._stage, self._stage.context
        self._session.note("building once, with both caches written")
        self._rested(stage.member.build(context).require_executed())
        stage.buildx.build("same", context, *self._cache)

        def ours(_: int) -> float:
            return self._built()

        def off(_: int) -> float:
            return self._built(*OFF)

        def buildx(_: int) -> float:
            done = stage.buildx.build("same", context, *self._cache)
            return self._rested(done.require_cached())

        found = self._session.interleave(
            "warm-with-cache", {"ours": ours, "off": off, "buildx": buildx}, runs=16, warmups=2
        )
        self._session.report("warm-with-cache", found["ours"], found["buildx"])
        self._session.report("warm-without-cache", found["ours"], found["off"])

    def imported(self, node: str) -> None:
        """As `warm`, on a node whose BuildKit has not made all of the cache itself."""
        stage = self._stage
        stage.pool.stop_node(node, stage.member)
        (stage.context / "last").write_text(secrets.token_hex(16))
        with stage.empty_node():
            self._rested(stage.member.build(stage.context).seconds)
        stage.pool.start_node(node, stage.member)
        for arguments in ((), OFF):
            # Layers that were only promised so far are fetched or made.
            self._rested(stage.member.build(stage.context, *arguments).seconds)
        found = self._session.interleave(
            "warm-imported",
            {"ours": lambda _: self._built(), "off": lambda _: self._built(*OFF)},
            runs=16,
            warmups=24,
        )
        self._session.report("warm-imported", found["ours"], found["off"])

    def cold(self) -> None:
        stage, context = self._stage, self._stage.context

        def salt() -> None:
            (context / "salt").write_text(secrets.token_hex(16))

        def ours(_: int) -> float:
            stage.member.wait_helper()
            salt()
            done = stage.member.build(context, "-t", "team/image")
            return self._rested(done.require_some_executed())

        def buildx(_: int) -> float:
            salt()
            done = stage.buildx.build("same", context, *self._cache, "-o", stage.pushed())
            return self._rested(done.require_some_executed())

        found = self._session.interleave("cold-export", {"ours": ours, "buildx": buildx}, runs=3)
        self._session.report("cold-export", found["ours"], found["buildx"])

    def parallel(self, node: str) -> None:
        """Eight builds of different projects of one repository, all new; then all on a new node."""
        stage = self._stage
        folder = self._session.work / "parallel"
        contexts = [small_project(folder / f"part{number}") for number in range(BUILDS)]

        def together(build: Callable[[Path], object]) -> float:
            for context in contexts:
                (context / "salt").write_text(secrets.token_hex(16))
            return self._rested(_together(build, contexts))

        def ours(_: int) -> float:
            stage.member.wait_helper()
            return together(lambda context: stage.member.build(context).require_some_executed())

        def buildx(_: int) -> float:
            return together(lambda context: stage.buildx.build("same", context, *self._cache))

        found = self._session.interleave("parallel-8", {"ours": ours, "buildx": buildx}, runs=4)
        together(lambda context: stage.member.build(context).require_some_executed())
        stage.pool.stop_node(node, stage.member)
        with stage.empty_node():
            for context in contexts:
                # Nothing was lost.
                stage.member.build(context).require_cached()
        stage.pool.start_node(node, stage.member)
        shutil.rmtree(folder)
        self._session.report("parallel-8", found["ours"], found["buildx"])


def _together(build: Callable[[Path], object], contexts: Sequence[Path]) -> float:
    """Build all at once; return the seconds until the last one has ended."""
    problems: list[BaseException] = []

    def one(context: Path) -> None:
        try:
            build(context)
        except BaseException as error:  # noqa: BLE001 - raised below
            problems.append(error)

    threads = [threading.Thread(target=one, args=(context,)) for context in contexts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if problems:
        raise BenchmarkError(f"{len(problems)} of {len(contexts)} builds failed") from problems[0]
    return seconds
