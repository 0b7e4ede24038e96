"""`cli`: what a user of the command line waits for: start, warm build, much output, `--load`."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.cli.load import CASES as LOAD
from benchmarks.cli.load import load
from benchmarks.model import Benchmark, BenchmarkError, Case
from benchmarks.onenode import BUILDER, BUILDX, NODE, start_parts, warm_contestants
from benchmarks.projects import log_project
from benchmarks.rss import PeakMemory, resident_bytes
from benchmarks.terminal import FAST, SLOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.commands import Finished
    from benchmarks.onenode import Parts
    from benchmarks.session import Session
    from benchmarks.terminal import Reader

START = (Case("help-startup", "offload-build --help", "docker buildx build --help", goal=1.0),)
WARM = (Case("warm-noop", "offload-build", BUILDX, goal=1.0),)
LOG = (
    Case("log-throughput", "2 million lines, plain, to a file", BUILDX, goal=1.0),
    Case("log-throughput-unbuffered", "300,000 lines, a write for each, plain", BUILDX, goal=1.0),
    Case("log-throughput-tty", "2 million lines, on a terminal", BUILDX, goal=1.0),
    Case("log-throughput-slow-tty", "2 million lines, on a slow terminal", BUILDX, goal=1.0),
)
MEMORY = (
    Case("log-memory-pool", "10 million lines: gateway and node grow by", "", unit="MB", limit=250),
    Case("log-memory-cli", "10 million lines: offload-build at its peak", "", unit="MB", limit=250),
)
LOG_LINES = 2_000_000
UNBUFFERED_LINES = 300_000
MANY_LINES = 10_000_000
MEGABYTE = 1e6
PLAIN = "--progress=plain"
GIVES_UP = "failed to receive status"
"""buildx ends with this when it has not shown all output 3 s after the build; its figure is then
the time to this end, less than it would need."""


def run(session: Session) -> None:
    """Measure the cases that the session wants, each group on daemons of its own."""
    if session.wants(*(case.name for case in (*START, *WARM, *LOG, *MEMORY))):
        _on_one_node(session)
    if session.wants(*(case.name for case in LOAD)):
        load(session)


def _on_one_node(session: Session) -> None:
    with ExitStack() as stack:
        parts = start_parts(session, stack)
        if session.wants(*(case.name for case in START)):
            _start(session, parts)
        if session.wants(*(case.name for case in WARM)):
            _warm(session, parts)
        if session.wants(*(case.name for case in LOG)):
            _log(session, parts)
        if session.wants(*(case.name for case in MEMORY)):
            _memory(session, parts)


def _start(session: Session, parts: Parts) -> None:
    def ours(_: int) -> float:
        return parts.member.help().seconds

    def buildx(_: int) -> float:
        return parts.buildx.help().seconds

    found = session.interleave("help-startup", {"ours": ours, "buildx": buildx}, runs=16)
    session.report("help-startup", found["ours"], found["buildx"])


def _warm(session: Session, parts: Parts) -> None:
    everybody = warm_contestants(session, parts)
    two = {name: everybody[name] for name in ("ours", "buildx")}
    found = session.interleave("warm-noop", two, runs=16, warmups=2)
    session.report("warm-noop", found["ours"], found["buildx"])


def _log(session: Session, parts: Parts) -> None:
    context = log_project(session.work / "log", LOG_LINES)
    member, peer = parts.member, parts.buildx

    def plain(case: str, context: Path, lines: int) -> None:
        def ours() -> Finished:
            done = member.build(context, PLAIN)
            _require_lines(done, lines)
            return done

        def theirs() -> Finished:
            return peer.build(BUILDER, context, PLAIN, tolerated=GIVES_UP)

        _pair(session, parts, context, case, ours, theirs)

    def terminal(case: str, reader: Reader) -> None:
        def ours() -> Finished:
            return member.build_on_terminal(context, reader=reader)

        def theirs() -> Finished:
            return peer.build_on_terminal(BUILDER, context, reader=reader, tolerated=GIVES_UP)

        _pair(session, parts, context, case, ours, theirs)

    plain("log-throughput", context, LOG_LINES)
    slowly = log_project(session.work / "unbuffered", UNBUFFERED_LINES, unbuffered=True)
    plain("log-throughput-unbuffered", slowly, UNBUFFERED_LINES)
    terminal("log-throughput-tty", FAST)
    terminal("log-throughput-slow-tty", SLOW)


def _pair(
    session: Session,
    parts: Parts,
    context: Path,
    case: str,
    ours: Callable[[], Finished],
    theirs: Callable[[], Finished],
) -> None:
    if not session.wants(case):
        return

    def timed(build: Callable[[], Finished]) -> float:
        parts.member.wait_helper()
        (context / "salt").write_text(secrets.token_hex(16))
        return parts.published(build().seconds)

    found = session.interleave(
        case, {"ours": lambda _: timed(ours), "buildx": lambda _: timed(theirs)}, runs=8
    )
    session.report(case, found["ours"], found["buildx"])


def _memory(session: Session, parts: Parts) -> None:
    context = log_project(session.work / "many", MANY_LINES)
    pool, member = parts.pool, parts.member
    servers = (pool.gateway_pid(), pool.node_pid(NODE))
    grown: list[float] = []

    def peak(_: int) -> float:
        member.wait_helper()
        (context / "salt").write_text(secrets.token_hex(16))
        before = resident_bytes(servers)
        client = member.helper_pid()
        with PeakMemory(lambda: servers) as pool_memory, PeakMemory(lambda: [client]) as memory:
            _require_lines(member.build(context, PLAIN), MANY_LINES)
            parts.published(0.0)
        grown.append((pool_memory.peak_bytes - before) / MEGABYTE)
        return memory.peak_bytes / MEGABYTE

    found = session.interleave("log-memory", {"cli": peak}, runs=3)
    session.report("log-memory-cli", found["cli"])
    session.report("log-memory-pool", grown[-len(found["cli"]) :])


def _require_lines(done: Finished, count: int) -> None:
    """Refuse a figure of a build that did not show every line.

    Raises:
        BenchmarkError: one is missing or out of order.
    """
    expected = 1
    for line in done.output.splitlines():
        # "#7 0.123 42"
        number = line.rpartition(" ")[2]
        if number == str(expected):
            expected += 1
    if expected != count + 1:
        raise BenchmarkError(f"line {expected} of the step's output is missing")


BENCHMARK = Benchmark(
    "cli",
    "the command line against that of docker buildx",
    (*START, *WARM, *LOG, *MEMORY, *LOAD),
    run,
)
