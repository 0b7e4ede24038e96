"""What `offload install` changes in buildx for compose, and brings back."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from offload_client.buildx import builders
from offload_client.connections import Connections
from offload_client.dockercli.composebuilds import ComposeBuilds
from offload_client.identity import save_identity
from offload_client.invocation import Invocation, text_stream
from offload_core.errors import AuthenticationError, ConfigError, UsageError
from tests.fixtures.memberidentity import identity

if TYPE_CHECKING:
    from pathlib import Path

HOUR = 3600.0
GATEWAY = "127.0.0.1:1"


def invocation(tmp_path: Path, **more: str) -> Invocation:
    """Somebody without buildx who is logged in."""
    environment = {
        "HOME": str(tmp_path), "PATH": "", "OFFLOAD_KEYRING": "off",
        "OFFLOAD_GATEWAY": GATEWAY, "OFFLOAD_PROJECT": "shop", **more,
    }  # fmt: skip
    run = Invocation((), tmp_path, environment, 0, text_stream(1), text_stream(2))
    save_identity(run, GATEWAY, identity(-HOUR, 200 * HOUR))
    return run


async def install(run: Invocation, *, force: bool = False) -> builders.Builder:
    async with Connections() as connections:
        return await ComposeBuilds(run).install(connections, force=force)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


async def test_our_builder_is_chosen_for_every_docker_endpoint(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    builder = await install(run)
    assert (builder.name, builder.project, builder.gateway) == ("offload", "shop", GATEWAY)
    assert not ComposeBuilds(run).has_buildx
    told = json.loads((tmp_path / ".docker/buildx/current").read_text())
    assert (told["Name"], told["Global"]) == ("offload", True)
    assert (tmp_path / ".docker/buildx/instances/offload").is_file()


async def test_nothing_of_buildx_before_is_nothing_after(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    before = content(tmp_path)
    await install(run)
    await install(run)
    assert ComposeBuilds(run).uninstall()
    assert content(tmp_path) == before
    assert not (tmp_path / ".docker/buildx").exists()
    assert not ComposeBuilds(run).uninstall()


async def test_the_choice_of_before_comes_back(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    store = ComposeBuilds(run)._store
    store.save("mine", endpoint="tcp://other:1", options={})
    store.choose("mine")
    before = content(tmp_path / ".docker/buildx")
    with pytest.raises(UsageError, match='buildx uses the builder "mine"'):
        await install(run)
    assert content(tmp_path / ".docker/buildx") == before
    await install(run, force=True)
    assert store.current() == "offload"
    assert ComposeBuilds(run).uninstall()
    assert content(tmp_path / ".docker/buildx") == before


async def test_a_choice_made_since_then_stays(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    await install(run)
    store = ComposeBuilds(run)._store
    store.save("mine", endpoint="tcp://other:1", options={})
    store.choose("mine")
    assert ComposeBuilds(run).uninstall()
    assert store.current() == "mine"
    assert store.find("offload") is None


async def test_a_builder_that_was_there_is_used_and_stays(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    own = builders.Builder("offload", GATEWAY, "other", ("linux/amd64",))
    builders.save_builder(run, own, identity(-HOUR, 200 * HOUR))
    assert await install(run) == own
    assert ComposeBuilds(run).uninstall()
    assert builders.find_builder(run, "offload") == own


async def test_without_a_login_nothing_is_left_behind(tmp_path: Path) -> None:
    run = invocation(tmp_path)
    nobody = dataclasses.replace(
        run, environment={**run.environment, "OFFLOAD_GATEWAY": "127.0.0.1:2"}
    )
    before = content(tmp_path)
    with pytest.raises(AuthenticationError):
        await install(nobody)
    variables = {**run.environment, "OFFLOAD_GATEWAY": ""}
    with pytest.raises(ConfigError, match="no gateway is configured"):
        await install(dataclasses.replace(run, environment=variables))
    assert content(tmp_path) == before
    assert not ComposeBuilds(run).uninstall()
