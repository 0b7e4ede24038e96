"""A node that is killed: its builds are lost, and what is said of them is true."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.node import TOOLS, WAIT_SECONDS, NodePool, RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = "RUN echo begun; sleep 2; for n in 1 2 3; do echo line $n; done; echo told; sleep 60\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def start_process(pool: NodePool, name: str) -> asyncio.subprocess.Process:
    """Start a node in a process of its own and wait until it is attached."""
    token = await pool.gateway.create_token(name, identity_pb.ROLE_NODE)
    settings = {
        "OFFLOAD_NODE_TOKEN": token,
        "OFFLOAD_NODE_ADVERTISE": "127.0.0.1:0",
        "OFFLOAD_NODE_BUILDKITD": str(TOOLS / "buildkitd"),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from offload_builder.cli.entry import main; main()", "node",
        "--gateway", pool.link.address, "--data", str(pool.folder / name),
        "--node-id", name, "--listen", "127.0.0.1:0",
        env={**os.environ, **settings},
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await asyncio.wait_for(pool.gateway.gateway.wait_for_nodes([name]), WAIT_SECONDS)
    except BaseException:
        process.kill()
        raise
    return process


async def printed(pool: NodePool, build_id: str) -> bytes:
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    request = builds_pb.LogsRequest(build_id=build_id)
    found = b""
    async for message in stub.Logs(request, metadata=call_metadata(), timeout=20):
        found += b"".join(log.data for batch in message.batches for log in batch.logs)
    return found


async def test_killed_node_leaves_the_log_and_a_true_end(pool):
    process = await start_process(pool, "one")
    try:
        assigned = await pool.assigned()
        client = RawClient(await pool.channel(assigned), assigned, STEPS)
        await client.start()
        await client.until_text(b"begun")
        # From here on the gateway hears nothing of what the node still writes down.
        pool.link.cut()
        await client.until_text(b"told")
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    with pytest.raises(grpc.RpcError):
        await client.until("result")
    pool.link.up = True
    agent = await pool.start_node(ended_keep=60.0)
    await pool.wait_state(assigned.build_id, builds_pb.BUILD_STATE_LOST)
    assert "start the build again" in (await pool.build(assigned.build_id)).error
    async with asyncio.timeout(20):
        while b"told" not in await printed(pool, assigned.build_id):
            await asyncio.sleep(0.1)
    assert (await printed(pool, assigned.build_id)).count(b"line 2") == 1
    # Who comes back hears the same from the node.
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    request = builds_pb.LocateRequest(build_id=assigned.build_id)
    found = await stub.Locate(request, metadata=call_metadata(), timeout=10)
    assigned.endpoints[:] = found.endpoints
    again = RawClient(await pool.channel(assigned), assigned)
    await again.rejoin()
    result = await again.until("result")
    assert result.failure.kind == node_pb.Failure.KIND_NODE
    assert "restarted" in result.failure.message
    await again.done()
    assert agent.ended.find(assigned.build_id) is not None
