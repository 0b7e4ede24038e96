"""Pipelines without stored secrets build on a real node: a protected branch, and a fork of it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.identityprovider import IdentityProvider
from tests.fixtures.node import NodePool
from tests.fixtures.oidcgateway import ISSUER, RULES
from tests.fixtures.pool import Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

STEP = "RUN mkdir /out && echo from-%s > /out/result\nFROM scratch\nCOPY --from=0 /out /\n"


@pytest.fixture
async def provider() -> AsyncIterator[IdentityProvider]:
    async with IdentityProvider() as running:
        yield running


@pytest.fixture
async def pool(provider: IdentityProvider) -> AsyncIterator[NodePool]:
    running = NodePool(protected_branches=("main",))
    rules = running.gateway.directory / "identity.toml"
    rules.write_text(ISSUER.format(url=provider.url, further="") + RULES)
    async with running:
        await running.start_node("one")
        yield running


async def build(pool: NodePool, home: Path, token: str, context: Path) -> dict[str, object]:
    """Build as a job does that has nothing but its token; return its line of the history."""
    home.mkdir()
    job = Member(
        home,
        {
            "OFFLOAD_GATEWAY": pool.gateway.address,
            "OFFLOAD_CA": pool.gateway.admin_token.rpartition("_")[2],
            "OFFLOAD_ID_TOKEN": token,
            "OFFLOAD_BRANCH": "main",
        },
    )
    out = home / "out"
    done = await asyncio.to_thread(job.build, "-o", f"type=local,dest={out}", str(context))
    assert done.returncode == 0, done.stderr
    assert (out / "result").read_text().startswith("from-")
    shown = await asyncio.to_thread(job.offload, "builds", "--format", "json")
    found: dict[str, object] = json.loads(shown.stdout)[0]
    assert not list(home.rglob("identity"))
    return found


async def test_job_builds_its_branch_and_a_fork_beside_it_changes_nothing(
    pool: NodePool, provider: IdentityProvider, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", STEP % "main")
    main = {"ref": "refs/heads/main", "ref_protected": True, "run_url": "https://ci.example/1"}
    first = await build(pool, tmp_path / "first", provider.token(**main), context)
    assert (first["vcs_branch"], first["identity"]["run_url"]) == ("main", "https://ci.example/1")
    fork = provider.token(**main, fork=True)
    second = await build(pool, tmp_path / "fork", fork, context)
    assert second["member"] != first["member"]
    assert second["identity"]["fork"] is True
    again = await build(pool, tmp_path / "again", provider.token(**main), context)
    assert again["member"] == first["member"]
    assert again["stats"]["steps_cached"] > 0
