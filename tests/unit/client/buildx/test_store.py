"""buildx's files, as we write and read them."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from offload_client.buildx.store import BuildxStore
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(tmp_path), **more}


def test_a_builder_is_written_as_buildx_does_it(tmp_path: Path) -> None:
    store = BuildxStore(environment(tmp_path))
    options = {"cert": "/c.pem", "servername": "shop.buildkit.offload"}
    store.save(
        "pool", endpoint="tcp://gw:7443", options=options,
        platforms=("linux/amd64", "linux/arm/v7"),
    )  # fmt: skip
    path = tmp_path / ".docker" / "buildx" / "instances" / "pool"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {
        "Name": "pool", "Driver": "remote", "Dynamic": False,
        "Nodes": [{
            "Name": "pool0", "Endpoint": "tcp://gw:7443", "DriverOpts": options, "Flags": None,
            "Files": None,
            "Platforms": [
                {"architecture": "amd64", "os": "linux"},
                {"architecture": "arm", "os": "linux", "variant": "v7"},
            ],
        }],
    }  # fmt: skip
    assert store.options("pool") == options
    store.remove("pool")
    assert store.find("pool") is None
    store.remove("pool")


@pytest.mark.parametrize(
    ("variables", "config", "key"),
    [
        ({}, {}, "unix:///var/run/docker.sock"),
        ({"DOCKER_HOST": "tcp://d:1"}, {"currentContext": "far"}, "tcp://d:1"),
        ({}, {"currentContext": "far"}, "far"),
        ({"DOCKER_CONTEXT": "near"}, {"currentContext": "far"}, "near"),
        ({"DOCKER_CONTEXT": "default"}, {}, "unix:///var/run/docker.sock"),
    ],
)
def test_the_choice_is_kept_for_the_docker_endpoint(
    tmp_path: Path, variables: dict[str, str], config: dict[str, str], key: str
) -> None:
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text(json.dumps(config))
    store = BuildxStore(environment(tmp_path, **variables))
    assert store.current() == ""
    store.choose("pool")
    told = json.loads((store.folder / "current").read_text())
    assert told == {"Key": key, "Name": "pool", "Global": False}
    assert store.current() == "pool"
    other = BuildxStore(environment(tmp_path, DOCKER_HOST="tcp://other:1"))
    assert other.current() == ""


def test_a_machine_keeps_its_name_in_another_store(tmp_path: Path) -> None:
    mine = BuildxStore(environment(tmp_path))
    assert mine.node_id() == ""
    mine.adopt("f00")
    assert mine.node_id() == "f00"


def test_a_store_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    store = BuildxStore(environment(tmp_path, BUILDX_CONFIG=str(tmp_path / "b")))
    store.save("pool", endpoint="tcp://gw:1", options={})
    (tmp_path / "b" / "instances" / "pool").write_text("{")
    with pytest.raises(ConfigError, match="instances/pool"):
        store.find("pool")
    (tmp_path / "file").write_text("")
    blocked = BuildxStore(environment(tmp_path, BUILDX_CONFIG=str(tmp_path / "file" / "b")))
    with pytest.raises(ConfigError, match="cannot write"):
        blocked.save("pool", endpoint="tcp://gw:1", options={})
