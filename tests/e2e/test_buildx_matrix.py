"""Stock docker buildx, docker and buildctl on the pool and on a BuildKit of their own, compared.

The rows are the table in docs/buildx.md.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.buildxmatrix import ROWS, table
from tests.fixtures.engine import DockerEngine
from tests.fixtures.matrixrow import Row, side_command
from tests.fixtures.parity import Contest, differences, stock_environment
from tests.fixtures.pool import Pool
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST = 30
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "buildx.md"
PLATFORMS = "linux/amd64,linux/arm64"


@dataclass(frozen=True)
class Rig:
    """What all rows share."""

    contest: Contest
    report: list[str]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A pool with a builder made by `offload buildx create`, and a BuildKit beside it."""
    work = tmp_path_factory.mktemp("matrix")
    report: list[str] = []
    with (
        DockerRegistry(work / "registry", auth={}) as registry,
        Pool(1, environment={"OFFLOAD_NODE_PLATFORMS": PLATFORMS}) as pool,
        Buildkitd(work / "buildkitd") as plain,
        DockerEngine("containerd") as engine,
        DockerEngine("graphdriver") as running,
    ):
        member = pool.member()
        plugins = member.home / ".docker" / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-buildx").symlink_to(TOOLS / "buildx")
        (plugins / "docker-compose").symlink_to(TOOLS / "docker-compose")
        done = member.offload("buildx", "create", "--use")
        assert done.returncode == 0, done.stderr
        variables = member.offload("buildx", "env", "--shell", "json")
        assert variables.returncode == 0, variables.stderr
        stock = stock_environment(work / "home", TOOLS / "buildx", plain.address)
        (work / "home/.docker/cli-plugins/docker-compose").symlink_to(TOOLS / "docker-compose")
        path = f"{TOOLS}:{member.environment['PATH']}"
        # docker build, unlike docker buildx build, does not follow "buildx use".
        ours = member.environment | {"PATH": path} | json.loads(variables.stdout)
        stock |= {"PATH": path, "BUILDKIT_HOST": plain.address}
        words = {"REGISTRY": registry.address, "ENGINE": engine.host, "RUNNING": running.host}
        yield Rig(Contest(ours, stock, words, side_command), report)
    (work / "report.md").write_text("\n".join(report) + "\n")
    print("\n".join(["", *report, f"{len(report)} rows, {work / 'report.md'}"]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_works_as_on_a_buildkit_of_its_own(rig: Rig, row: Row, tmp_path: Path) -> None:
    outcomes = rig.contest.run(row, tmp_path)
    found = differences(row, outcomes)
    for side, outcome in outcomes.items():
        shown = str(outcome.seen.get("stdout", "")) + outcome.stderr
        if row.shows not in shown:
            found.append(f"{side} does not show {row.shows!r} but\n{shown}")
    rig.report.append(f"| `{row.shown}` | {row.compared} | {'differs' if found else 'equal'} |")
    shown = [f"--- {side}\n{outcome.stderr}" for side, outcome in outcomes.items()]
    assert not found, "\n".join([*found, *shown])


def test_the_documentation_has_every_row() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= LEAST
    assert table() in DOCUMENT.read_text(), f"docs/buildx.md must have:\n{table()}"


@pytest.mark.parametrize(
    ("program", "says"),
    [("buildx", "github.com/docker/buildx v0."), ("docker-compose", "Docker Compose version v5.")],
)
def test_plugins_are_stock(program: str, says: str) -> None:
    version = subprocess.run(
        [TOOLS / program, "version"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    assert says in version
