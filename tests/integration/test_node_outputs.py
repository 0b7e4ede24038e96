"""Outputs that stream to the client: complete or an error, and never a build that hangs."""

from __future__ import annotations

import asyncio
import io
import tarfile
from typing import TYPE_CHECKING

import grpc
import pytest

from offload_builder.node import outputs
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BIG = "RUN dd if=/dev/urandom of=/big bs=1M count=24\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_with_outputs(pool: NodePool, steps: str, count: int = 1) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    for _ in range(count):
        client.spec.outputs.add(type=Output.TYPE_TAR)
    return client


async def read(client: RawClient, index: int) -> bytes:
    request = node_pb.ReadOutputRequest(output_index=index)
    call = client.blobs.ReadOutput(request, metadata=client.metadata)
    return b"".join([message.data async for message in call])


async def test_output_is_complete_when_its_stream_ends_well(pool):
    agent = await pool.start_node()
    client = await client_with_outputs(pool, BIG)
    await client.start()
    ready = await client.until("output_ready")
    reading = asyncio.ensure_future(read(client, ready.output_index))
    assert (await client.until("result")).HasField("success")
    with tarfile.open(fileobj=io.BytesIO(await reading)) as archive:
        assert archive.getmember("big").size == 24 << 20
    # It was given once.
    with pytest.raises(grpc.RpcError, match="read already"):
        await read(client, ready.output_index)
    await client.done()
    await wait_free(agent)


async def test_output_that_nobody_reads_fails_the_build_in_time(pool, monkeypatch):
    monkeypatch.setattr(outputs.OutputStream.__init__, "__kwdefaults__", {
        "unopened_seconds": 0.5, "stalled_seconds": 600.0,
    })  # fmt: skip
    agent = await pool.start_node()
    client = await client_with_outputs(pool, BIG)
    await client.start()
    async with asyncio.timeout(30):
        result = await client.until("result")
    assert "has not read output 0" in result.failure.message
    await client.done()
    await wait_free(agent)


async def test_output_that_is_left_half_read_fails_the_build(pool):
    agent = await pool.start_node()
    client = await client_with_outputs(pool, BIG)
    await client.start()
    ready = await client.until("output_ready")
    request = node_pb.ReadOutputRequest(output_index=ready.output_index)
    call = client.blobs.ReadOutput(request, metadata=client.metadata)
    assert (await call.read()).data
    call.cancel()
    result = await client.until("result")
    assert "stopped reading output 0" in result.failure.message
    await client.done()
    await wait_free(agent)


async def test_no_output_ends_well_when_the_build_fails_while_it_is_written(pool):
    agent = await pool.start_node()
    client = await client_with_outputs(pool, BIG, count=2)
    await client.start()
    first = await client.until("output_ready")
    # The other one is opened and given up: the solve fails, and so must the first stream.
    reading = asyncio.ensure_future(read(client, first.output_index))
    second = await client.until("output_ready")
    request = node_pb.ReadOutputRequest(output_index=second.output_index)
    call = client.blobs.ReadOutput(request, metadata=client.metadata)
    assert (await call.read()).data
    call.cancel()
    result = await client.until("result")
    assert result.HasField("failure")
    with pytest.raises(grpc.RpcError) as caught:
        await reading
    assert caught.value.details() == result.failure.message
    await client.done()
    await wait_free(agent)
