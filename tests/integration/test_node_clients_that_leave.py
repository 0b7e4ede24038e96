"""A client may leave at any moment: the node holds nothing for it afterwards."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.contentclients import batch
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = "COPY extra /extra\nRUN echo begun; sleep 60\n"
QUICK = "RUN echo quick\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_of(pool: NodePool, steps: str) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    client.files["extra"] = (b"%f" % time.time() * 100_000, 0o100644)
    return client


async def at_once(client: RawClient) -> None:
    await client.start()


async def at_context_request(client: RawClient) -> None:
    await client.start()
    await client.until("context_request")


async def in_upload(client: RawClient) -> None:
    await client.start()
    entries: list[int] = []
    while (last := client.page().paths.index("extra")) not in entries:
        entries += (await client.until("need_blobs")).entries
    call = client.blobs.Upload(metadata=client.metadata)
    client.uploads.append(call)
    # What came from a client that left stays, so the second one is asked for the last file only.
    for entry in entries:
        if entry != last:
            await call.write(batch(client.contents[entry]))
            assert (await asyncio.wait_for(call.read(), 10)).stored_blobs == 1
    await call.write(batch())


async def in_step(client: RawClient) -> None:
    await client.start()
    await client.until_text(b"begun")


STAGES = [at_once, at_context_request, in_upload]


async def test_build_that_needs_its_client_no_more_ends_by_a_cancel_only(pool):
    agent = await pool.start_node(slots=1)
    client = await client_of(pool, STEPS)
    await in_step(client)
    client.vanish()
    await asyncio.sleep(0.5)
    assert client.assigned.build_id in agent.slots.builds
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    request = builds_pb.CancelRequest(build_id=client.assigned.build_id)
    began = time.monotonic()
    await stub.Cancel(request, metadata=call_metadata(), timeout=10)
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_CANCELED)
    assert time.monotonic() - began < 3
    await wait_free(agent)


async def test_client_that_cancels_in_a_step_leaves_nothing_behind(pool):
    agent = await pool.start_node(slots=1)
    client = await client_of(pool, STEPS)
    await in_step(client)
    await client.send(cancel=node_pb.CancelRun(reason="by the user"))
    assert (await client.until("result")).failure.message == "by the user"
    await client.done()
    await wait_free(agent)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_client_that_vanishes_or_cancels_leaves_nothing_behind(pool, stage):
    agent = await pool.start_node(slots=1)
    vanishing = await client_of(pool, STEPS)
    await stage(vanishing)
    # Before that the slot is only reserved, and the gateway gives it back after a while.
    await pool.wait_state(vanishing.assigned.build_id, builds_pb.BUILD_STATE_RUNNING)
    vanishing.vanish()
    await wait_free(agent)
    await pool.wait_state(vanishing.assigned.build_id, builds_pb.BUILD_STATE_CANCELED)

    canceling = await client_of(pool, STEPS)
    await stage(canceling)
    began = time.monotonic()
    await canceling.send(cancel=node_pb.CancelRun(reason="by the user"))
    result = await canceling.until("result")
    assert time.monotonic() - began < 3
    assert result.failure.kind == node_pb.Failure.KIND_CANCELED
    assert result.failure.message == "by the user"
    await canceling.done()
    for call in canceling.uploads:
        call.cancel()
    await wait_free(agent)
    await pool.wait_state(canceling.assigned.build_id, builds_pb.BUILD_STATE_CANCELED)


async def test_client_that_leaves_before_start_gives_its_slot_back(pool):
    agent = await pool.start_node(slots=1)
    client = await client_of(pool, QUICK)
    await client.open()
    await asyncio.sleep(0.1)
    client.vanish()
    agent.cancel(client.assigned.build_id, "as the gateway does when the client does not come")
    await wait_free(agent)


async def test_slot_is_free_when_the_build_ends_and_the_rest_when_the_client_leaves(pool):
    agent = await pool.start_node(slots=1)
    first = await client_of(pool, QUICK)
    await first.start()
    assert (await first.until("result")).HasField("success")
    # The first client has neither left nor said Done.
    second = await client_of(pool, QUICK)
    await second.start()
    assert (await second.until("result")).HasField("success")
    await second.done()
    first.vanish()
    await wait_free(agent)
    await pool.wait_state(first.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)


async def test_cache_is_exported_after_the_client_has_left(pool):
    agent = await pool.start_node()
    client = await client_of(pool, "COPY extra /e\n" + QUICK)
    await client.start()
    assert (await client.until("result")).HasField("success")
    client.vanish()
    await wait_free(agent)
    async with asyncio.timeout(20):
        while (
            await pool.build(client.assigned.build_id)
        ).cache_state != builds_pb.CACHE_STATE_PUBLISHED:
            await asyncio.sleep(0.05)


async def test_ticket_is_taken_once(pool):
    await pool.start_node()
    client = await client_of(pool, QUICK)
    await client.start()
    await client.until("result")
    again = RawClient(await pool.channel(client.assigned), client.assigned, QUICK)
    await again.start()
    with pytest.raises(grpc.RpcError, match="used before"):
        await again.until("result")
    await client.done()


async def test_client_that_comes_after_its_slot_was_given_away_is_told_to_start_again(pool):
    agent = await pool.start_node(slots=1)
    client = await client_of(pool, QUICK)
    agent.cancel(client.assigned.build_id, "as the gateway does")
    await client.start()
    with pytest.raises(grpc.RpcError, match="start the build again") as caught:
        await client.until("result")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
