"""`docker compose` with docker's own CLI and plugins, on the pool by `offload install`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.composerows import COMPOSED
from tests.fixtures.engine import DockerEngine
from tests.fixtures.matrixrow import side_command
from tests.fixtures.parity import Contest, differences, stock_environment
from tests.fixtures.pool import COMMAND_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member

PLUGINS = ("buildx", "compose")
FILES = {
    "compose.yaml": "services:\n  web:\n    image: web:1\n    build: { context: ., args: [V=1] }\n",
    "Dockerfile": "FROM scratch\nARG V\nCOPY compose.yaml /\nLABEL v=$V\n",
}


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    with DockerEngine("containerd") as running:
        yield running


def docker(
    member: Member, engine: DockerEngine, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, errors="replace",
        timeout=COMMAND_SECONDS, cwd=cwd or member.home, stdin=subprocess.DEVNULL,
        env={**member.environment, "DOCKER_HOST": engine.host},
    )  # fmt: skip


def with_plugins(home: Path) -> None:
    folder = home / ".docker" / "cli-plugins"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLUGINS:
        link = folder / f"docker-{name}"
        if not link.is_symlink():
            link.symlink_to(TOOLS / ("buildx" if name == "buildx" else "docker-compose"))


def project(folder: Path) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_compose_builds_on_the_pool_until_it_is_uninstalled(
    member: Member, tmp_path: Path, engine: DockerEngine
) -> None:
    with_plugins(member.home)
    folder = project(tmp_path / "p")
    known = {build["build_id"] for build in member.builds()}
    installed = member.offload("install")
    assert installed.returncode == 0, installed.stderr
    assert 'by the builder "offload"' in installed.stdout
    assert not installed.stderr
    built = docker(member, engine, "compose", "build", cwd=folder)
    assert built.returncode == 0, built.stderr
    (build,) = [build for build in member.builds() if build["build_id"] not in known]
    assert build["client"] == "buildx"
    labels = engine.inspect("web:1")["Config"]["Labels"]
    assert labels["v"] == "1"
    assert labels["com.docker.compose.service"] == "web"
    direct = docker(member, engine, "build", "--build-arg", "V=2", "-t", "web:2", ".", cwd=folder)
    assert direct.returncode == 0, direct.stderr
    assert engine.inspect("web:2")["Config"]["Labels"] == {"v": "2"}
    undone = member.offload("uninstall")
    assert undone.returncode == 0, undone.stderr
    assert member.offload("buildx", "ls", "--format", "json").stdout == "[]\n"
    left = docker(member, engine, "buildx", "ls")
    assert left.returncode == 0, left.stderr
    assert "offload" not in left.stdout
    count = len(member.builds())
    # The engine's own builder cannot reach anything here, so only where it goes is looked at.
    docker(member, engine, "compose", "build", "--quiet", cwd=folder)
    assert len(member.builds()) == count


def test_another_builder_of_buildx_is_left_or_given_back(
    member: Member, engine: DockerEngine
) -> None:
    with_plugins(member.home)
    made = docker(
        member, engine, "buildx", "create", "--name", "mine", "--use", "--driver", "remote",
        "tcp://127.0.0.1:1",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    current = member.home / ".docker/buildx/current"
    before = current.read_bytes()
    member.environment["DOCKER_HOST"] = engine.host
    refused = member.offload("install")
    assert refused.returncode == 0, refused.stderr
    assert 'docker compose builds as before: buildx uses the builder "mine"' in refused.stderr
    assert current.read_bytes() == before
    forced = member.offload("install", "--force")
    assert forced.returncode == 0, forced.stderr
    assert not forced.stderr
    assert current.read_bytes() != before
    assert member.offload("uninstall").returncode == 0
    assert current.read_bytes() == before


def test_images_are_those_of_a_buildkit_of_its_own(
    member: Member, tmp_path: Path, engine: DockerEngine
) -> None:
    with_plugins(member.home)
    assert member.offload("install").returncode == 0
    (row,) = [row for row in COMPOSED if row.name == "compose-build"]
    with Buildkitd(tmp_path / "buildkitd") as plain:
        stock = stock_environment(tmp_path / "home", TOOLS / "buildx", plain.address)
        with_plugins(tmp_path / "home")
        contest = Contest(member.environment, stock, {"ENGINE": engine.host}, side_command)
        outcomes = contest.run(row, tmp_path / "run")
    found = differences(row, outcomes)
    shown = [f"--- {side}\n{outcome.stderr}" for side, outcome in outcomes.items()]
    assert not found, "\n".join([*found, *shown])
    assert str(outcomes["ours"].seen["stdout"]).count("sha256:") == 4
