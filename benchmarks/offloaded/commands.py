"""Cases of single docker commands: what the way to the engine adds to them."""

from __future__ import annotations

import statistics
import subprocess
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError, Case
from benchmarks.offloaded.ground import IMAGE, Ground
from benchmarks.offloaded.sshserver import over_ssh
from tests.fixtures.sessionengine import DirectEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

DIRECT = "the same over the engine's socket at the node"
SSH = "the same with docker -H ssh://, loopback"
PS = Case("ps-added", "docker ps, the difference of the medians", "", unit="ms", limit=5)
RUN = Case("run-vs-direct", "docker run --rm box true", DIRECT, goal=1.1)
RUN_SSH = Case("run-vs-ssh", "docker run --rm box true", SSH)
RUN_PLAIN = Case("run-vs-plain", "docker run --rm box true", "an engine of its own, as root")
# A throughput of 0.6 is a time of 1.67, one of 1.2 a time of 0.83.
SAVE = Case("save-vs-direct", "docker save, 200 MB", DIRECT, goal=1.67)
SAVE_SSH = Case("save-vs-ssh", "docker save, 200 MB", SSH, goal=0.83)
TO = Case("cp-to", "docker cp of 200 MB into a container", DIRECT, goal=1.67)
TO_SSH = Case("cp-to-vs-ssh", "docker cp of 200 MB into a container", SSH, goal=0.83)
FROM = Case("cp-from", "docker cp of 200 MB out of a container", DIRECT, goal=1.67)
FROM_SSH = Case("cp-from-vs-ssh", "docker cp of 200 MB out of a container", SSH, goal=0.83)
CASES = (PS, RUN, RUN_SSH, RUN_PLAIN, SAVE, SAVE_SSH, TO, TO_SSH, FROM, FROM_SSH)
BYTES = 200_000_000
BULK = "bulk:1"
OURS = "session"
Way = tuple[str, str]
"""Its name and the address for docker."""


def commands(session: Session, folder: Path) -> None:
    """Measure the cases."""
    with Ground(folder, ready=0) as ground:
        ground.start()
        ground.load()
        with (
            over_ssh(folder / "ssh", ground.direct, ground.environment) as ssh,
            DirectEngine() as plain,
        ):
            ground.docker(plain.host, "load", "-q", "-i", str(ground.archive))
            ways = {OURS: ground.session, "direct": ground.direct, "ssh": ssh}
            if session.wants(PS.name):
                found = _ps(session, ground, ways)
                added = statistics.median(found[OURS]) - statistics.median(found["direct"])
                session.report(PS.name, [1000 * added])
            if session.wants(RUN.name, RUN_SSH.name, RUN_PLAIN.name):
                found = _runs(session, ground, ways | {"plain": plain.host})
                session.report(RUN.name, found[OURS], found["direct"])
                session.report(RUN_SSH.name, found[OURS], found["ssh"])
                session.report(RUN_PLAIN.name, found[OURS], found["plain"])
            _bulk(session, ground, ways)


def _ps(session: Session, ground: Ground, ways: dict[str, str]) -> dict[str, list[float]]:
    def measure(host: str) -> Callable[[int], float]:
        return lambda _: ground.docker(host, "ps")[1]

    contestants = {name: measure(host) for name, host in ways.items()}
    return session.interleave(PS.name, contestants, runs=40, warmups=4)


def _runs(session: Session, ground: Ground, ways: dict[str, str]) -> dict[str, list[float]]:
    def measure(host: str) -> Callable[[int], float]:
        return lambda _: ground.docker(host, "run", "--rm", IMAGE, "true")[1]

    contestants = {name: measure(host) for name, host in ways.items()}
    return session.interleave(RUN.name, contestants, runs=16, warmups=2)


def _bulk(session: Session, ground: Ground, ways: dict[str, str]) -> None:
    """Measure the cases that move a file; it does not compress, as docker might."""
    if not session.wants(*(case.name for case in CASES[4:])):
        return
    large = ground.work / "large"
    subprocess.run(
        f"openssl enc -aes-128-ctr -nosalt -pass pass:x < /dev/zero 2>/dev/null "
        f"| head -c {BYTES} > {large}",
        shell=True, check=True,
    )  # fmt: skip
    direct = ways["direct"]
    ground.docker(direct, "run", "-d", "--name", "bulk", IMAGE, "sleep", "86400")
    ground.docker(direct, "cp", str(large), "bulk:/large")
    ground.docker(direct, "commit", "bulk", BULK)

    def save(host: str) -> Callable[[int], float]:
        return lambda _: _whole(*ground.drained(host, "save", BULK))

    def copy_from(host: str) -> Callable[[int], float]:
        return lambda _: _whole(*ground.drained(host, "cp", "bulk:/large", "-"))

    def copy_to(host: str) -> Callable[[int], float]:
        return lambda _: ground.docker(host, "cp", str(large), "bulk:/copy")[1]

    for cases, measure in (
        ((SAVE, SAVE_SSH), save),
        ((TO, TO_SSH), copy_to),
        ((FROM, FROM_SSH), copy_from),
    ):
        if session.wants(*(case.name for case in cases)):
            contestants = {name: measure(host) for name, host in ways.items()}
            found = session.interleave(cases[0].name, contestants, runs=10)
            session.report(cases[0].name, found[OURS], found["direct"])
            session.report(cases[1].name, found[OURS], found["ssh"])


def _whole(count: int, seconds: float) -> float:
    if count < BYTES:
        raise BenchmarkError(f"only {count} bytes came")
    return seconds
