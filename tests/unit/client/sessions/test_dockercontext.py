"""Docker contexts of sessions, compared with those that docker's own CLI writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from offload_client.sessions.dockercontext import DESCRIPTION, DockerContexts
from offload_core.errors import ConfigError, InvalidValueError

DOCKER = "docker"
NAME = "docker-offload"
CONFIG = '{\n\t"auths": {\n\t\t"r.example": {}\n\t},\n\t"psFormat": "é {{.ID}}",\n\t"zoom": 1\n}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    return tmp_path / "d"


def contexts(folder: Path, **more: str) -> DockerContexts:
    return DockerContexts({"DOCKER_CONFIG": str(folder), "HOME": "/nowhere", **more})


def docker(folder: Path, *arguments: str) -> str:
    environment = {"DOCKER_CONFIG": str(folder), "PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(
        [DOCKER, *arguments], capture_output=True, text=True, timeout=60, env=environment,
        check=True,
    )  # fmt: skip
    return done.stdout


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o7777, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_context_is_the_file_that_docker_writes(tmp_path: Path) -> None:
    socket = tmp_path / "engine.sock"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    contexts(ours).write(NAME, socket)
    docker(
        theirs, "context", "create", NAME, "--description", DESCRIPTION, "--docker",
        f"host=unix://{socket}",
    )  # fmt: skip
    assert files(ours) == files(theirs)


def test_docker_reads_and_uses_what_was_written(folder: Path) -> None:
    ours = contexts(folder)
    ours.write(NAME, folder / "engine.sock")
    assert ours.select(NAME) == ""
    listed = [json.loads(line) for line in docker(
        folder, "context", "ls", "--format", "json").splitlines()]  # fmt: skip
    mine = next(one for one in listed if one["Name"] == NAME)
    assert mine["Current"] is True
    assert mine["DockerEndpoint"] == f"unix://{folder}/engine.sock"
    assert mine["Error"] == ""
    assert docker(folder, "context", "show").strip() == NAME


def test_choosing_and_giving_back_keeps_the_configuration_as_it_was(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "config.json").chmod(0o640)
    before = files(folder)
    ours = contexts(folder)
    ours.write(NAME, folder / "engine.sock")
    former = ours.select(NAME)
    assert json.loads((folder / "config.json").read_text())["currentContext"] == NAME
    assert ours.restore(NAME, former) == ""
    assert ours.remove(NAME, folder / "engine.sock")
    assert files(folder) == before


def test_former_context_comes_back_unless_another_one_was_chosen_meanwhile(folder: Path) -> None:
    docker(folder, "context", "create", "mine", "--docker", "host=unix:///x")
    docker(folder, "context", "use", "mine")
    ours = contexts(folder)
    ours.write(NAME, folder / "engine.sock")
    assert ours.select(NAME) == "mine"
    assert ours.restore(NAME, "mine") == "mine"
    assert docker(folder, "context", "show").strip() == "mine"
    ours.select(NAME)
    docker(folder, "context", "use", "default")
    assert ours.restore(NAME, "mine") is None
    assert docker(folder, "context", "show").strip() == "default"


def test_former_context_that_is_gone_gives_way_to_the_default(folder: Path) -> None:
    ours = contexts(folder)
    ours.write(NAME, folder / "engine.sock")
    ours.select(NAME)
    assert ours.restore(NAME, "nosuch") == ""
    assert docker(folder, "context", "show").strip() == "default"


def test_context_of_somebody_else_is_neither_replaced_nor_removed(folder: Path) -> None:
    docker(folder, "context", "create", NAME, "--docker", "host=ssh://somewhere")
    before = files(folder)
    with pytest.raises(InvalidValueError, match="not of a session"):
        contexts(folder).write(NAME, folder / "engine.sock")
    assert not contexts(folder).remove(NAME, folder / "engine.sock")
    assert files(folder) == before


def test_context_of_an_older_place_is_replaced(folder: Path) -> None:
    contexts(folder).write(NAME, Path("/old/sessions/default/engine.sock"))
    contexts(folder).write(NAME, folder / "engine.sock")
    assert contexts(folder).host(NAME) == f"unix://{folder}/engine.sock"


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"DOCKER_HOST": "tcp://h:1"}, "DOCKER_HOST"),
        ({"DOCKER_CONTEXT": "other"}, "DOCKER_CONTEXT"),
        ({"DOCKER_CONTEXT": NAME}, None),
    ],
)
def test_variables_that_docker_obeys_more_are_found(
    folder: Path, environment: dict[str, str], variable: str | None
) -> None:
    found = contexts(folder, **environment).overriding(NAME)
    assert (found.variable if found else None) == variable


def test_broken_configuration_of_docker_is_refused_and_kept(folder: Path) -> None:
    (folder / "config.json").write_text('{"auths": ')
    with pytest.raises(ConfigError, match="not valid JSON"):
        contexts(folder).select(NAME)
    assert (folder / "config.json").read_text() == '{"auths": '
