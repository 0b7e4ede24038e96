"""`offload install` and `offload uninstall`, file by file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from offload_client.dockercli.installation import Installation
from offload_client.invocation import Invocation
from offload_core.errors import ConfigError, OffloadError


@pytest.fixture
def invocation(tmp_path: Path):
    with Path(os.devnull).open("w") as stream:
        yield Invocation([], tmp_path, {"HOME": str(tmp_path)}, stream.fileno(), stream, stream)


def everything(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in home.rglob("*")
        if path.is_file() or path.is_symlink()
    }


def test_nothing_before_is_nothing_after(invocation: Invocation, tmp_path: Path):
    Installation(invocation).install(force=False)
    assert Path(tmp_path / ".docker/cli-plugins/docker-offload").resolve().is_file()
    assert Installation(invocation).uninstall()
    assert everything(tmp_path) == {}
    assert not (tmp_path / ".docker").exists()
    assert not Installation(invocation).uninstall()


def test_twice_installed_is_once_undone(invocation: Invocation, tmp_path: Path):
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text('{"auths":{}}')
    before = everything(tmp_path)
    Installation(invocation).install(force=False)
    Installation(invocation).install(force=True)
    Installation(invocation).uninstall()
    assert everything(tmp_path) == before


def test_plugin_of_somebody_else_is_refused_or_given_back(invocation: Invocation, tmp_path: Path):
    plugins = tmp_path / ".docker/cli-plugins"
    plugins.mkdir(parents=True)
    (tmp_path / "theirs").write_text("#!/bin/sh\n")
    (plugins / "docker-offload").symlink_to(tmp_path / "theirs")
    before = everything(tmp_path)
    with pytest.raises(OffloadError, match="somebody else's plugin"):
        Installation(invocation).install(force=False)
    assert everything(tmp_path) == before
    Installation(invocation).install(force=True)
    Installation(invocation).uninstall()
    assert everything(tmp_path) == before


def test_file_in_the_place_of_the_plugin_is_never_replaced(invocation: Invocation, tmp_path: Path):
    plugins = tmp_path / ".docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-offload").write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match="move it away"):
        Installation(invocation).install(force=True)
    assert (plugins / "docker-offload").read_text() == "#!/bin/sh\n"
    assert not (tmp_path / ".docker/config.json").exists()


def test_alias_that_others_have_set_since_stays(invocation: Invocation, tmp_path: Path):
    Installation(invocation).install(force=False)
    config = tmp_path / ".docker/config.json"
    config.write_text(json.dumps({"aliases": {"builder": "other"}, "new": 1}))
    Installation(invocation).uninstall()
    assert json.loads(config.read_text()) == {"aliases": {"builder": "other"}, "new": 1}
    assert not (tmp_path / ".docker/cli-plugins/docker-offload").exists()


def test_keys_that_were_added_since_stay(invocation: Invocation, tmp_path: Path):
    Installation(invocation).install(force=False)
    config = tmp_path / ".docker/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auths": {"x": {}}}))
    Installation(invocation).uninstall()
    assert json.loads(config.read_text()) == {"auths": {"x": {}}}
