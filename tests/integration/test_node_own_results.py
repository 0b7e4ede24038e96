"""A BuildKit that made all there is to import itself does not read an import."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from offload_proto.v1 import builds_service_pb2 as builds_pb
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

    from offload_builder.node.agent import NodeAgent

STEPS = "RUN echo made > /made && echo first-ran\nRUN cat /made && echo second-ran\n"
CACHED = 4


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


@pytest.fixture
def options(tmp_path: Path) -> Any:
    with MinioServer(tmp_path) as minio:
        yield {
            "s3_endpoint": minio.endpoint_url,
            "s3_bucket": "cache",
            "s3_access_key": minio.access_key,
            "s3_secret_key": minio.secret_key,
        }


async def built(pool: NodePool, steps: str = STEPS) -> RawClient:
    """Build; return when the cache of the build is where all nodes can read it."""
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    async with asyncio.timeout(30):
        while (await pool.build(assigned.build_id)).cache_state not in (
            builds_pb.CACHE_STATE_PUBLISHED, builds_pb.CACHE_STATE_UNCHANGED,
        ):  # fmt: skip
            await asyncio.sleep(0.05)
    return client


def imported(client: RawClient) -> bool:
    return any(
        vertex.name.startswith("importing cache manifest")
        for message in client.seen
        for vertex in message.progress.vertices
    )


def cached(client: RawClient) -> int:
    return client.seen[-1].result.stats.steps_cached


async def is_whole(agent: NodeAgent) -> bool:
    """Return whether BuildKit has made all that it has."""
    return (await agent._projects.runtime("default")).own_results.hold_all([])


async def test_builds_of_the_only_node_import_nothing_until_another_has_contributed(pool, options):
    agent = await pool.start_node("one", **options)
    await built(pool)
    again = await built(pool)
    assert await is_whole(agent)
    assert cached(again) == CACHED
    await pool.stop_node("one")

    # Also after a restart of the node.
    agent = await pool.start_node("one", **options)
    again = await built(pool)
    assert await is_whole(agent)
    assert cached(again) == CACHED
    await pool.stop_node("one")

    await pool.start_node("two", **options)
    elsewhere = await built(pool)
    assert imported(elsewhere)
    assert cached(elsewhere) == CACHED
    # Its layers may not have been fetched yet, and can be read with the import only.
    assert imported(await built(pool))
    other = STEPS + "RUN echo third-ran\n"
    assert imported(await built(pool, other))
    await pool.stop_node("two")

    await pool.start_node("one", **options)
    beside = await built(pool, other)
    assert imported(beside)
    assert cached(beside) == CACHED + 1


async def test_an_import_that_was_asked_for_in_case_of_news_is_empty_without_them(
    pool, options, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("offload_cache.offers._NEWS_SECONDS", -1.0)
    agent = await pool.start_node("one", **options)
    await built(pool)
    again = await built(pool)
    assert imported(again)
    assert cached(again) == CACHED
    assert await is_whole(agent)


async def test_what_buildkit_has_removed_is_imported(pool, options):
    agent = await pool.start_node("one", **options)
    await built(pool)
    runtime = await agent._projects.runtime("default")
    await runtime.rest()
    assert not runtime.own_results.look_due
    async with runtime.use() as client:
        assert await client.prune(everything=True)
    await runtime.rest()
    again = await built(pool)
    assert imported(again)
    assert cached(again) == CACHED
