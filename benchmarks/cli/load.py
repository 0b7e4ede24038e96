"""`--load` over a WAN: one small layer of a large image has changed, and a first image."""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.context.stage import BUILDER, BUILDX, MEGABYTE, open_stage, slow_link
from benchmarks.model import BenchmarkError, Case
from benchmarks.peers import Buildx
from benchmarks.projects import add_busybox
from tests.fixtures.engine import DockerEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.commands import Finished
    from benchmarks.context.stage import Stage
    from benchmarks.session import Session

LAYERS = 10
LAYER_BYTES = 100_000_000
CHANGED_BYTES = 20_000
CHANGED_MEGABYTES = CHANGED_BYTES / MEGABYTE + 0.1
"""The layer, and 100 KB for everything else."""
CHANGED_RATIO = 0.1
FIRST_BYTES = 100_000_000
RUNS = 2
STORE = "containerd"
PEER = f"{BUILDX}, --load"
CHANGED = "--load of 1 GB, of which a layer of 20 KB has changed"
FIRST = "--load of 100 MB that the engine has nothing of"

CASES = (
    Case("load-small-change-wan", CHANGED, PEER, goal=CHANGED_RATIO),
    Case("load-small-change-wan-bytes", CHANGED, PEER, unit="MB", limit=CHANGED_MEGABYTES),
    Case("load-first", FIRST, PEER, goal=1.0),
    Case("load-first-bytes", FIRST, PEER, unit="MB"),
)
BASE = 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
NOISE = "RUN head -c {size} /dev/urandom > /noise{number}\n"


def load(session: Session) -> None:
    """Measure the cases, each group on empty daemons: a large image is in several places."""
    if session.wants("load-small-change-wan", "load-small-change-wan-bytes"):
        with _opened(session, "change") as bench:
            bench.small_change()
    if session.wants("load-first", "load-first-bytes"):
        with _opened(session, "first") as bench:
            bench.first()


@contextmanager
def _opened(session: Session, name: str) -> Iterator[_Load]:
    with open_stage(session, f"load-{name}") as stage:
        # The engine stands beside the user: what it pulls from them does not pass the link.
        with stage.far():
            engine = DockerEngine(STORE)
            engine.start()
        try:
            yield _Load(session, stage, engine)
        finally:
            engine.stop()


class _Load:
    """Somebody who builds with `--load` into one engine, with our client and with buildx."""

    def __init__(self, session: Session, stage: Stage, engine: DockerEngine) -> None:
        self._session = session
        self._stage = stage
        self._engine = engine
        self._member = stage.member(stage.far)
        self._buildx = Buildx(stage.work / stage.name("x"), stage.far)
        self._buildx.create(BUILDER, stage.port.address, stage.port.client)
        self._received: dict[str, list[float]] = {"ours": [], "buildx": []}

    def small_change(self) -> None:
        """One small layer of a large image is new in each run."""
        context = self._project(LAYERS * [LAYER_BYTES])
        self._session.note("building 1 GB once, and loading it on both sides without the WAN")
        for name in self._received:
            self._build(name, context)

        def run(name: str) -> Callable[[int], float]:
            def changed(_: int) -> float:
                (context / "last").write_bytes(secrets.token_bytes(CHANGED_BYTES))
                return self._build(name, context)

            return changed

        self._compare("load-small-change-wan", run)

    def first(self) -> None:
        """The engine has nothing of an image that the builder has."""
        context = self._project([FIRST_BYTES])
        self._session.note("building once on both sides")
        for name in self._received:
            self._build(name, context)

        def run(name: str) -> Callable[[int], float]:
            def emptied(_: int) -> float:
                self._empty()
                return self._build(name, context)

            return emptied

        self._compare("load-first", run)

    def _compare(self, case: str, run: Callable[[str], Callable[[int], float]]) -> None:
        contestants = {name: run(name) for name in self._received}
        with slow_link(self._stage):
            found = self._session.interleave(case, contestants, runs=RUNS, warmups=0)
        self._check()
        self._session.report(case, found["ours"], found["buildx"])
        received = {name: self._received[name][-len(found[name]) :] for name in found}
        self._session.report(f"{case}-bytes", received["ours"], received["buildx"])

    def _project(self, layers: list[int]) -> Path:
        folder = self._stage.work / "project"
        folder.mkdir()
        noise = [NOISE.format(size=size, number=number) for number, size in enumerate(layers)]
        (folder / "Dockerfile").write_text(f"{BASE}{''.join(noise)}COPY last /last\n")
        (folder / "last").write_bytes(secrets.token_bytes(CHANGED_BYTES))
        add_busybox(folder)
        return folder

    def _build(self, name: str, context: Path) -> float:
        """Build and load; return the seconds, and keep what reached the client's side."""
        arguments = ("--load", "-t", f"bench:{name}")
        before = self._stage.link.client.counters()
        done = self._command(name, context, *arguments)
        received = (self._stage.link.client.counters() - before).received_bytes / MEGABYTE
        self._received[name].append(received)
        self._session.note(f"{name} received {received:.3f} MB in {done.seconds:.2f} s")
        self._stage.rest()
        return done.seconds

    def _command(self, name: str, context: Path, *arguments: str) -> Finished:
        host = self._engine.host
        if name == "ours":
            return self._member.build(context, *arguments, docker_host=host)
        return self._buildx.build(BUILDER, context, *arguments, docker_host=host)

    def _empty(self) -> None:
        """Remove all images, and wait until the engine has none."""
        for name in self._received:
            self._engine.docker("rmi", "-f", f"bench:{name}")
        self._engine.docker("image", "prune", "-af")
        deadline = time.monotonic() + 30
        while self._engine.names():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the engine keeps {sorted(self._engine.names())}")
            time.sleep(0.1)

    def _check(self) -> None:
        """Check that the image which was loaded last is there."""
        if not any(self._engine.inspect(f"bench:{name}") for name in self._received):
            raise BenchmarkError(f"nothing was loaded:\n{self._engine.log_tail()}")
