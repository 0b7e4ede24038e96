"""Branch and revision from `.git`, and nothing else from anywhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from offload_client.build.vcs import branch_and_revision

REVISION = "0123456789abcdef" * 2 + "01234567"


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", *arguments],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "r"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "topic/one")
    git(folder, "commit", "-q", "--allow-empty", "-m", "x")
    return folder


def test_branch_below_the_repository(repository: Path) -> None:
    (repository / "sub").mkdir()
    expected = ("topic/one", git(repository, "rev-parse", "HEAD"))
    assert branch_and_revision(repository / "sub") == expected
    git(repository, "pack-refs", "--all")
    assert branch_and_revision(repository) == expected


def test_detached_head_and_worktree(repository: Path, tmp_path: Path) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    git(repository, "worktree", "add", "-q", "-b", "two", str(tmp_path / "w"))
    assert branch_and_revision(tmp_path / "w") == ("two", revision)
    git(repository, "checkout", "-q", "--detach")
    assert branch_and_revision(repository) == ("", revision)


def test_no_repository_or_no_commit(tmp_path: Path) -> None:
    assert branch_and_revision(tmp_path) == ("", "")
    git(tmp_path, "init", "-q", "-b", "main")
    assert branch_and_revision(tmp_path) == ("main", "")


@pytest.mark.parametrize(
    "head", [b"ref: /etc/hostname", b"ref: refs/../../../secret", b"secret words", b"\xff\xfe", b""]
)
def test_crafted_repository_reveals_no_other_file(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "secret").write_text("secret words")
    (tmp_path / "c" / ".git" / "refs").mkdir(parents=True)
    (tmp_path / "c" / ".git" / "HEAD").write_bytes(head)
    assert branch_and_revision(tmp_path / "c") == ("", "")


def test_crafted_git_file_reveals_nothing(tmp_path: Path) -> None:
    (tmp_path / "HEAD").write_text("private text")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".git").write_text("gitdir: ..\n")
    assert branch_and_revision(tmp_path / "c") == ("", "")
    (tmp_path / "HEAD").write_text(REVISION)
    assert branch_and_revision(tmp_path / "c") == ("", REVISION)
