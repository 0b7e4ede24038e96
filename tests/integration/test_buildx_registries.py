"""Stock docker buildx and registries for which the pool holds a login."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from tests.fixtures.buildx import Buildx
from tests.fixtures.node import NodePool, wait_free
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.registrybuilds import write_registries
from tests.fixtures.tokenserver import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens") as server:
        yield server


@pytest.fixture
def registry(tmp_path: Path, tokens: TokenServer) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path / "registry", auth=tokens.auth) as running:
        yield running


@pytest.fixture
def simple(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A registry with a password file, of which the pool knows nothing."""
    with DockerRegistry(tmp_path / "simple") as running:
        yield running


def configured(folder: Path, host: str) -> Path:
    (folder / "password").write_text(PASSWORD)
    return write_registries(
        folder, host, "http = true", f'username = "{USER}"',
        f'password_file = "{folder / "password"}"', 'push = ["team/**"]',
    )  # fmt: skip


async def test_a_push_uses_the_pools_login_where_it_may(tmp_path, registry, tokens):
    host = registry.address
    async with NodePool() as pool:
        agent = await pool.start_node(registry_config=configured(tmp_path, host))
        async with Buildx(pool.gateway.address, pool.keys) as user:
            result = await user.build("-t", f"{host}/team/app:1", "--push")
            assert result.code == 0, result.output
            assert {item.user for item in tokens.asked} == {USER}
            # A large context goes through the same session.
            (user.context / "noise").write_bytes(b"0123456789abcdef" * (1 << 20))
            user.dockerfile(
                "COPY noise /\nRUN --mount=type=secret,id=token busybox sha256sum /noise\n"
            )
            (user.context / "token").write_text("s3cr3t-value")
            secret = ("--secret", "id=token,src=token")
            result = await user.build(*secret, "-o", "type=local,dest=out")
            assert result.code == 0, result.output
            copied = (user.context / "out" / "noise").read_bytes()
            assert copied == (user.context / "noise").read_bytes()
            result = await user.build("-t", f"{host}/other/app:1", "--push")
            assert result.code != 0
        await wait_free(agent)
        assert await named_secrets(pool) == [[], [], ["token"]]


async def named_secrets(pool):
    """Return the secrets that the audit log names, by build."""
    audit = ("audit", "--format", "json", "--data-dir", str(pool.gateway.directory))
    told = (await asyncio.to_thread(CliRunner().invoke, main, audit)).stdout
    records = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    ended = [record for record in records if record["action"] == "build.ended"]
    return sorted(record["secret_ids"] for record in ended)


async def test_the_clients_own_login_comes_first_and_other_hosts_are_its_own(
    tmp_path, registry, tokens, simple
):
    tokens.users = {USER: PASSWORD, "ann": "hers"}
    tokens.rights = {USER: ("team/",), "ann": ("other/",)}
    async with NodePool() as pool:
        await pool.start_node(registry_config=configured(tmp_path, registry.address))
        async with Buildx(pool.gateway.address, pool.keys) as user:
            user.login(simple.address, USER, PASSWORD)
            result = await user.build("-t", f"{simple.address}/mine/app:1", "--push")
            assert result.code == 0, result.output
            user.login(registry.address, "ann", "hers")
            result = await user.build("-t", f"{registry.address}/other/app:1", "--push")
            assert result.code == 0, result.output
            assert "ann" in {item.user for item in tokens.asked}
