"""`docker build` with docker's own CLI, on the pool."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.engine import DockerEngine
from tests.fixtures.pool import COMMAND_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member

DOCKER = "/usr/bin/docker"
"""Debian's docker.io."""
CONFIG = '{\n\t"auths": {\n\t\t"registry.example": {}\n\t},\n\t"credsStore": "x",\n\t"zoom": 1\n}'


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    with DockerEngine("graphdriver") as running:
        yield running


def docker(
    member: Member, *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER, *map(str, arguments)], capture_output=True, text=True, errors="replace",
        timeout=COMMAND_SECONDS, cwd=cwd or member.home, stdin=subprocess.DEVNULL,
        env={**member.environment, "OFFLOAD_BUILDX": "none", **environment},
    )  # fmt: skip


def test_docker_build_goes_to_the_pool_until_it_is_uninstalled(
    member: Member, tmp_path: Path
) -> None:
    config = member.home / ".docker/config.json"
    config.parent.mkdir()
    config.write_text(CONFIG)
    config.chmod(0o640)
    installed = member.offload("install")
    assert installed.returncode == 0, installed.stderr
    assert str(config) in installed.stdout
    assert json.loads(config.read_text()) == {
        **json.loads(CONFIG), "aliases": {"builder": "offload"},
    }  # fmt: skip
    context = make_context(tmp_path / "c", "ARG A\nRUN echo $A > /a\n")
    known = {build["build_id"] for build in member.builds()}
    for words in (["build"], ["image", "build"], ["builder", "build"]):
        result = docker(
            member, "--log-level", "info", *words, "--build-arg", f"A={words}", "-o", "out",
            "--progress", "plain", ".", cwd=context,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert (context / "out/a").read_text() == f"{words}\n"
    assert len({build["build_id"] for build in member.builds()} - known) == 3
    failed = docker(member, "build", "-f", "nosuch", ".", cwd=context)
    assert failed.returncode == 1
    assert "failed to read dockerfile" in failed.stderr
    assert docker(member, "offload", "status").returncode == 0
    other = docker(member, "builder", "prune")
    assert other.returncode == 1
    assert "docker buildx, which is not installed" in other.stderr
    undone = member.offload("uninstall")
    assert undone.returncode == 0, undone.stderr
    assert config.read_text() == CONFIG
    assert config.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.json"]
    assert "nothing to undo" in member.offload("uninstall").stdout


def test_docker_bake_file_is_built_by_the_plugin(member: Member, tmp_path: Path) -> None:
    assert member.offload("install").returncode == 0
    context = make_context(tmp_path / "c", "RUN echo baked > /a\n")
    (context / "docker-bake.hcl").write_text('target "default" {\n output = ["out"]\n}\n')
    result = docker(member, "offload", "bake", cwd=context)
    assert result.returncode == 0, result.stderr
    assert (context / "out/a").read_text() == "baked\n"


def test_terminated_docker_ends_the_build(member: Member, tmp_path: Path) -> None:
    assert member.offload("install").returncode == 0
    context = make_context(tmp_path / "c", "RUN echo begun && sleep 600\n")
    building = subprocess.Popen(
        [shutil.which("docker", path="/usr/local/bin:/usr/bin") or DOCKER, "build", "--progress",
         "plain", "-o", "out", "."],
        cwd=context, env=member.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert building.stderr is not None
    for line in building.stderr:
        if "begun" in line and "RUN" not in line:
            break
    building.send_signal(signal.SIGTERM)
    building.communicate(timeout=20)
    assert building.returncode != 0
    member.wait_state("canceled", 15)


def test_install_refuses_the_place_of_another_builder_and_gives_it_back(member: Member) -> None:
    config = member.home / ".docker/config.json"
    config.parent.mkdir()
    text = '{\n  "aliases": {\n    "builder": "buildx",\n    "x": "y"\n  }\n}\n'
    config.write_text(text)
    refused = member.offload("install")
    assert refused.returncode == 1
    assert 'the plugin "buildx" already' in refused.stderr
    assert config.read_text() == text
    assert not (member.home / ".docker/cli-plugins").exists()
    forced = member.offload("install", "--force")
    assert forced.returncode == 0, forced.stderr
    assert json.loads(config.read_text())["aliases"] == {"builder": "offload", "x": "y"}
    again = member.offload("install")
    assert again.returncode == 0, again.stderr
    assert member.offload("uninstall").returncode == 0
    assert config.read_text() == text


def test_builder_that_the_user_names_is_left_to_buildx(member: Member, tmp_path: Path) -> None:
    assert member.offload("install").returncode == 0
    buildx = tmp_path / "buildx"
    buildx.write_text('#!/bin/sh\necho "buildx $*"\n')
    buildx.chmod(0o755)
    for words, environment in (
        (["build", "--builder", "mine", "."], {}),
        (["build", "."], {"BUILDX_BUILDER": "mine"}),
        (["builder", "prune", "-f"], {}),
    ):
        result = docker(member, *words, OFFLOAD_BUILDX=str(buildx), **environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("buildx "), result.stdout
    assert os.path.lexists(member.home / ".docker/cli-plugins/docker-offload")


def test_image_of_docker_build_is_in_the_local_engine(
    member: Member, tmp_path: Path, engine: DockerEngine
) -> None:
    assert member.offload("install").returncode == 0
    context = make_context(tmp_path / "c", "LABEL who=docker-build\n")
    built = docker(member, "build", "-q", "-t", "mine:1", ".", cwd=context, DOCKER_HOST=engine.host)
    assert built.returncode == 0, built.stderr
    assert engine.inspect("mine:1")["Id"] == built.stdout.strip()
    asked = docker(
        member, "-H", engine.host, "build", "-t", "mine:2", ".", cwd=context,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert engine.inspect("mine:2")["Id"] == built.stdout.strip()
    kept = docker(
        member, "build", "-t", "mine:3", ".", cwd=context, DOCKER_HOST=engine.host,
        BUILDX_NO_DEFAULT_LOAD="1",
    )  # fmt: skip
    assert kept.returncode == 0, kept.stderr
    assert "mine:3" not in " ".join(engine.names())
