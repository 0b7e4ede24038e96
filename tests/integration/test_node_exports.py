"""Exports of the cache wait for builds, and builds do not wait for them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.exportturns import ExportTurns
from offload_proto.v1 import builds_service_pb2 as builds_pb
from tests.fixtures.node import NodePool, RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LONG_SECONDS = 120.0


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NodePool]:
    """One node on which builds always need all processors."""
    monkeypatch.setattr("offload_builder.node.buildends.builds_crowd", lambda _: True)
    monkeypatch.setattr(
        "offload_builder.node.buildends.ExportTurns",
        partial(ExportTurns, patience_seconds=LONG_SECONDS),
    )
    async with NodePool() as running:
        await running.start_node()
        yield running


async def built(pool: NodePool, steps: str) -> str:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    assert (await client.until("result")).HasField("success")
    await client.done()
    return assigned.build_id


async def cache_state(pool: NodePool, build_id: str) -> int:
    return (await pool.build(build_id)).cache_state


async def test_export_waits_until_the_next_build_needs_what_it_holds_or_the_node_stops(pool):
    first = await built(pool, "RUN echo first > /made\n")
    await asyncio.sleep(1.0)
    assert await cache_state(pool, first) == builds_pb.CACHE_STATE_PENDING

    # It uses BuildKit's copy of the same sources, which the export of the first still holds.
    second = await built(pool, "RUN echo second > /made\n")
    async with asyncio.timeout(30):
        while await cache_state(pool, first) != builds_pb.CACHE_STATE_PUBLISHED:
            await asyncio.sleep(0.05)
    assert await cache_state(pool, second) == builds_pb.CACHE_STATE_PENDING

    await pool.stop_node()
    assert await cache_state(pool, second) == builds_pb.CACHE_STATE_PUBLISHED
