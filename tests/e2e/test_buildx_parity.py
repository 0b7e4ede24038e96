"""The same command lines through stock `docker buildx build` and through `offload-build`.

Both use the same BuildKit at the same time; what they leave behind, print and answer is compared.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.contexts import make_context
from tests.fixtures.parity import (
    Case,
    Contest,
    differences,
    flags_of,
    stock_environment,
)
from tests.fixtures.paritycases import ARCHIVE, FORMS
from tests.fixtures.parityclient import CLIENT
from tests.fixtures.parityflags import FLAGS, NEEDS
from tests.fixtures.paritysteps import STEPS
from tests.fixtures.pool import BIN, Pool
from tests.fixtures.registry import DockerRegistry
from tests.fixtures.remotefiles import git_repository, web_server
from tests.fixtures.trees import write_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CASES: tuple[Case, ...] = (*FORMS, *STEPS, *FLAGS, *CLIENT)
LEAST = 60
PLATFORMS = "linux/amd64,linux/arm64"
"""The second one without an emulator: whoever lists it says that COPY and the like are enough."""
HELP = subprocess.run(
    [BIN / "offload-build", "--help"], capture_output=True, text=True, check=True, timeout=60
).stdout
HAVE = flags_of(HELP)
ENABLED = [case for case in CASES if case.needs <= HAVE]


@dataclass(frozen=True)
class Rig:
    """What all cases share."""

    pool: Pool
    contest: Contest


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One node, a user of docker whose builder is its BuildKit, and places to fetch from."""
    work = tmp_path_factory.mktemp("rig")
    served = work / "srv"
    first = {
        "Dockerfile": "FROM scratch\nCOPY . /\n", ".dockerignore": "ign*\n", "ignored": "x",
        "sub/dir/D.dev": "FROM scratch\nCOPY f /sub-f\n", "sub/dir/f": "first\n",
    }  # fmt: skip
    git_repository(work / "git", served / "app.git", first, {"sub/dir/f": "second\n"})
    write_files(served, {"c.tar": ARCHIVE, "D.txt": "FROM scratch\nWORKDIR /w\n"})
    with (
        DockerRegistry(work / "registry", auth={}) as registry,
        web_server(served) as web,
        Pool(1, environment={"OFFLOAD_NODE_PLATFORMS": PLATFORMS}) as pool,
    ):
        member = pool.member()
        base = make_context(work / "base")
        done = member.build("-t", f"{registry.address}/base:1", "--push", base)
        assert done.returncode == 0, done.stderr
        toml = pool.data / "node-1/projects/default/buildkit/buildkitd.toml"
        address = re.search(r"unix://[^\"']+", toml.read_text())
        assert address is not None
        stock = stock_environment(work / "home", TOOLS / "buildx", address[0])
        words = {"WEB": web, "REGISTRY": registry.address, "STOCK": str(work / "home")}
        yield Rig(pool, Contest(member.environment, stock, words))


@pytest.mark.parametrize("case", ENABLED, ids=lambda case: case.name)
def test_same_as_stock_buildx(rig: Rig, case: Case, tmp_path: Path) -> None:
    outcomes = rig.contest.run(case, tmp_path)
    found = differences(case, outcomes)
    shown = [f"--- {side}\n{outcome.stderr}" for side, outcome in outcomes.items()]
    assert not found, "\n".join([*found, *shown])


def test_enough_command_lines_are_compared() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert set().union(*(case.needs for case in CASES)) == NEEDS
    waiting = [f"{case.name} ({', '.join(sorted(case.needs - HAVE))})"
               for case in CASES if case not in ENABLED]  # fmt: skip
    print(f"{len(ENABLED)} of {len(CASES)} compared; waiting for a flag: {waiting}")
    assert len(ENABLED) >= LEAST
    if NEEDS <= HAVE:
        assert len(ENABLED) == len(CASES)
