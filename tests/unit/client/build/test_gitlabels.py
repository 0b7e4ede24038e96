"""Labels from the git repository of a build context."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from offload_client.build.gitlabels import with_git_labels
from offload_client.build.options import BuildOptions
from offload_client.invocation import Invocation

NAMES = ("org.opencontainers.image.revision", "org.opencontainers.image.source",
         "com.docker.image.source.entrypoint")  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "Dockerfile").write_text("FROM scratch\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "remote", "add", "origin", "https://ann:pw@git.example/app.git")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example")
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


async def labels(folder: Path, told: list[str], path: str = "app", **given: str) -> dict[str, str]:
    invocation = replace(
        Invocation.of_process([]), cwd=folder,
        environment={"PATH": os.environ["PATH"], "HOME": str(folder), **given},
    )  # fmt: skip
    options = BuildOptions(path=path, labels={"team": "a", NAMES[0]: "by hand"})
    return dict((await with_git_labels(invocation, options, told.append)).labels)


async def test_labels_are_those_of_buildx(repository: Path) -> None:
    told: list[str] = []
    revision = git(repository, "rev-parse", "HEAD")
    found = await labels(repository, told, BUILDX_GIT_LABELS="1")
    assert found.pop("team") == "a"
    assert found == dict(
        zip(NAMES, (revision, "https://git.example/app.git", "app/Dockerfile"), strict=True)
    )
    (repository / "new").write_text("x")
    assert (await labels(repository, told, BUILDX_GIT_LABELS="full"))[NAMES[0]] == revision
    changed = await labels(repository, told, BUILDX_GIT_LABELS="true", BUILDX_GIT_CHECK_DIRTY="1")
    assert changed[NAMES[0]] == f"{revision}-dirty"
    assert not told


async def test_nothing_is_added_unasked_or_outside_of_a_repository(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told: list[str] = []
    kept = {"team": "a", NAMES[0]: "by hand"}
    assert await labels(repository, told) == kept
    assert await labels(repository, told, BUILDX_GIT_LABELS="0") == kept
    other = tmp_path_factory.mktemp("other")
    assert await labels(other, told, ".", BUILDX_GIT_LABELS="1") == kept
    assert await labels(other, told, "https://git.example/a.git", BUILDX_GIT_LABELS="1") == kept
    assert not told


async def test_missing_git_is_a_warning(repository: Path) -> None:
    told: list[str] = []
    await labels(repository, told, ".", BUILDX_GIT_LABELS="1", PATH="/nonexistent")
    assert "commit information was not captured" in told[0]
