"""When a build whose steps are all cached has its cache exported all the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from offload_proto.v1 import builds_service_pb2 as builds_pb
from tests.fixtures.node import NodePool, RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIRST = "RUN echo one > /one\n"
SECOND = FIRST + "RUN echo two > /two\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def build(pool: NodePool, scope: str, steps: str) -> str:
    """Run a build and return what became of its cache."""
    choice = builds_pb.CacheChoice(scope=scope, read_scopes=["base"])
    assigned = await pool.assigned(cache=choice)
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    waiting = {builds_pb.CACHE_STATE_UNSPECIFIED, builds_pb.CACHE_STATE_PENDING}
    async with asyncio.timeout(30):
        while (state := (await pool.build(assigned.build_id)).cache_state) in waiting:
            await asyncio.sleep(0.05)
    return builds_pb.CacheState.Name(state).removeprefix("CACHE_STATE_").lower()


async def test_a_scope_gets_what_ran_for_another_scope(pool: NodePool) -> None:
    await pool.start_node()
    assert await build(pool, "base", FIRST) == "published"
    assert await build(pool, "feature", SECOND) == "published"
    assert await build(pool, "feature", SECOND) == "unchanged"
    # After a merge: every step is cached on this node, and no other node could know.
    assert await build(pool, "release", SECOND) == "published"
    assert await build(pool, "release", SECOND) == "unchanged"


async def test_a_failed_export_is_made_up_for_by_the_next_build(
    pool: NodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pool.start_node()
    assert await build(pool, "base", FIRST) == "published"
    with monkeypatch.context() as patched:
        patched.setattr("offload_builder.node.solvejob.EXPORT_SECONDS", 0.0)
        assert await build(pool, "base", SECOND) == "failed"
    assert await build(pool, "base", SECOND) == "published"
    assert await build(pool, "base", SECOND) == "unchanged"
