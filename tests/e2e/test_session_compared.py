"""Command lines of docker on an engine beside us and through a session do the same."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.fixtures import sessionrows as containers
from tests.fixtures import sessionrowsobjects as objects
from tests.fixtures.pool import Pool
from tests.fixtures.sessionengine import DirectEngine
from tests.fixtures.sessionrow import Outcome, Row, differences
from tests.fixtures.sessionside import Side, box_archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# The first row of a group runs all of the group, on both sides; what is pruned in one depends on
# those before it.
pytestmark = [pytest.mark.timeout(600), pytest.mark.in_order]
LEAST = 110
# The other engine has all of the machine too.
NODE = {
    "OFFLOAD_NODE_ISOLATION": "netns",
    "OFFLOAD_NODE_SESSIONS_READY": "0",
    "OFFLOAD_NODE_SESSION_IDLE": "1h",
}
GROUPS: Mapping[str, tuple[Row, ...]] = {
    "engine": containers.ENGINE,
    "run": containers.RUNNING,
    "terminal": containers.TERMINAL,
    "life": containers.LIFE,
    "logs": containers.LOGS,
    "cp": objects.COPIES,
    "images": objects.IMAGES,
    "volumes": objects.VOLUMES,
    "networks": objects.NETWORKS,
    "ports": objects.PORTS,
    "events": objects.EVENTS,
    "build": objects.BUILDS,
    "compose": objects.COMPOSED,
}
ROWS = [(group, row) for group, rows in GROUPS.items() for row in rows]


class Contest:
    """Both sides, and what came of the groups that have run."""

    def __init__(self, ours: Side, theirs: Side) -> None:
        self._sides = (ours, theirs)
        self._outcomes: dict[str, dict[str, tuple[Outcome, Outcome]]] = {}

    def outcomes(self, group: str, row: Row) -> tuple[Outcome, Outcome]:
        """Return what a row did on both sides."""
        if group not in self._outcomes:
            with ThreadPoolExecutor(2) as threads:
                runs = list(threads.map(lambda side: _run(side, GROUPS[group]), self._sides))
            names = [each.name for each in GROUPS[group]]
            self._outcomes[group] = dict(zip(names, zip(*runs, strict=True), strict=True))
        return self._outcomes[group][row.name]


def _run(side: Side, rows: tuple[Row, ...]) -> list[Outcome]:
    side.write(objects.FILES)
    try:
        return [side.run(row) for row in rows]
    finally:
        side.clean()


@pytest.fixture(scope="module")
def session_docker() -> Iterator[str]:
    """Start a session in a pool; return the address of its engine, as docker's context has it."""
    with Pool(1, environment=NODE) as pool:
        member = pool.member()
        started = member.offload("start", "--progress", "plain")
        assert started.returncode == 0, started.stdout + started.stderr + pool.tails()
        host = subprocess.run(
            ["docker", "context", "inspect", "docker-offload", "-f", "{{.Endpoints.docker.Host}}"],
            env=member.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        yield host.stdout.strip()
        stopped = member.offload("stop", "--force")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr + pool.tails()


@pytest.fixture(scope="module")
def contest(session_docker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contest]:
    """Both sides, each with a folder and a home of its own."""
    archive: Path = box_archive(tmp_path_factory.mktemp("box") / "box.tar")
    with (
        DirectEngine() as engine,
        Side(session_docker, archive) as ours,
        Side(engine.host, archive, engine.place) as theirs,
    ):
        yield Contest(ours, theirs)


@pytest.mark.parametrize(("group", "row"), ROWS, ids=[f"{group}-{row.name}" for group, row in ROWS])
def test_does_the_same_in_a_session(contest: Contest, group: str, row: Row) -> None:
    ours, theirs = contest.outcomes(group, row)
    found = differences(row, ours, theirs)
    assert not found, "\n".join([f"$ {row.command}", *found])


def test_there_are_enough_rows_and_each_has_a_name_of_its_own() -> None:
    assert len(ROWS) >= LEAST
    assert len({(group, row.name) for group, row in ROWS}) == len(ROWS)
