"""Which Dockerfile and ignore file a build uses."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from offload_client.build.contextfiles import ContextFiles, find_context
from offload_client.build.options import BuildOptions
from offload_client.context.statindex import index_path
from offload_client.invocation import Invocation
from offload_core.errors import ContextError, InvalidValueError


def at(cwd: Path, **environment: str) -> Invocation:
    return Invocation([], cwd, environment, 0, io.StringIO(), io.StringIO())


def find(cwd: Path, path: str, file: str = "") -> ContextFiles:
    return find_context(at(cwd), BuildOptions(path, file=file))


def inline(files: ContextFiles) -> dict[tuple[str, str], bytes]:
    return {(item.local_name, item.path): item.data for item in files.inline}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "Dockerfile").write_text("FROM a\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Dockerfile.dev").write_text("FROM b\n")
    return tmp_path


def test_dockerfile_of_the_context(tree: Path) -> None:
    files = find(tree, "app")
    assert files.root == tree / "app"
    assert inline(files) == {("dockerfile", "Dockerfile"): b"FROM a\n"}


@pytest.mark.parametrize("absolute", [True, False])
def test_given_dockerfile_may_be_outside_of_the_context(tree: Path, absolute: bool) -> None:
    given = str(tree / "other/Dockerfile.dev") if absolute else "../other/Dockerfile.dev"
    files = find(tree / "app", ".", given)
    assert files.dockerfile_name == "Dockerfile.dev"
    assert inline(files) == {("dockerfile", "Dockerfile.dev"): b"FROM b\n"}


def test_given_dockerfile_is_relative_to_the_directory_then_to_the_context(tree: Path) -> None:
    (tree / "app" / "x.Dockerfile").write_text("FROM inside\n")
    assert inline(find(tree, "app", "x.Dockerfile")) == {
        ("dockerfile", "x.Dockerfile"): b"FROM inside\n"
    }
    (tree / "x.Dockerfile").write_text("FROM here\n")
    assert inline(find(tree, "app", "x.Dockerfile")) == {
        ("dockerfile", "x.Dockerfile"): b"FROM here\n"
    }


def test_ignore_files_of_dockerfile_and_context_both_travel(tree: Path) -> None:
    (tree / "app" / ".dockerignore").write_text("one\n")
    (tree / "other" / "Dockerfile.dev.dockerignore").write_text("two\n")
    assert inline(find(tree, "app", "other/Dockerfile.dev")) == {
        ("dockerfile", "Dockerfile.dev"): b"FROM b\n",
        ("dockerfile", "Dockerfile.dev.dockerignore"): b"two\n",
        ("context", ".dockerignore"): b"one\n",
    }


def test_lower_case_name_is_taken_when_there_is_no_other(tree: Path) -> None:
    (tree / "low").mkdir()
    (tree / "low" / "dockerfile").write_text("FROM low\n")
    assert find(tree, "low").dockerfile_name == "dockerfile"
    assert find(tree, "low", "low/Dockerfile").dockerfile_name == "dockerfile"
    (tree / "low" / "Dockerfile").write_text("FROM high\n")
    assert find(tree, "low").dockerfile_name == "Dockerfile"


def test_linked_dockerfile_is_read_under_its_own_name(tree: Path) -> None:
    (tree / "linked").mkdir()
    (tree / "linked" / "Dockerfile").symlink_to("../other/Dockerfile.dev")
    assert inline(find(tree, "linked")) == {("dockerfile", "Dockerfile"): b"FROM b\n"}


@pytest.mark.parametrize(
    ("path", "file", "problem"),
    [
        ("", "", 'path "" not found'),
        ("nowhere", "", 'path "nowhere" not found'),
        ("app/Dockerfile", "", "is not a directory"),
        ("other", "", "failed to read dockerfile: open Dockerfile: no such file"),
        ("app", "other", "is not a regular file"),
        ("app", "pipe", "is not a regular file"),
        ("app", "loop", "failed to read dockerfile"),
    ],
)
def test_what_cannot_be_read_is_named(tree: Path, path: str, file: str, problem: str) -> None:
    os.mkfifo(tree / "pipe")
    (tree / "loop").symlink_to("loop")
    with pytest.raises(ContextError) as caught:
        find(tree, path, file)
    assert problem in caught.value.message
    assert caught.value.exit_code == 1


def test_directory_that_looks_remote_is_a_directory(tree: Path) -> None:
    (tree / "github.com" / "a").mkdir(parents=True)
    (tree / "github.com" / "a" / "Dockerfile").write_text("FROM a\n")
    assert find(tree, "github.com/a").dockerfile_name == "Dockerfile"


def test_dockerfile_whose_name_cannot_travel(tree: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tree / name).write_text("FROM a\n")
    with pytest.raises(InvalidValueError, match="UTF-8"):
        find(tree, "app", name)


def test_pipelines_keep_no_index(tmp_path: Path) -> None:
    assert index_path(at(tmp_path, HOME="/h")) == Path("/h/.cache/offload/statindex.db")
    assert index_path(at(tmp_path, HOME="/h", OFFLOAD_TOKEN="t")) is None
    kept = index_path(at(tmp_path, OFFLOAD_TOKEN="t", XDG_CACHE_HOME="/c"))
    assert kept == Path("/c/offload/statindex.db")
