"""Faults around a node: its shared store, its gateway, its own end, its own disk."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from minio import Minio

from offload_builder.node.config import NodeConfig
from offload_builder.node.server import NodeServer
from offload_core.errors import ConfigError
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = "RUN echo made > /made && echo first-ran\nRUN cat /made && echo second-ran\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_of(pool: NodePool, steps: str = STEPS) -> RawClient:
    assigned = await pool.assigned()
    return RawClient(await pool.channel(assigned), assigned, steps)


async def built(pool: NodePool, steps: str = STEPS) -> RawClient:
    client = await client_of(pool, steps)
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    return client


async def wait_published(pool: NodePool, client: RawClient) -> None:
    async with asyncio.timeout(30):
        while (
            await pool.build(client.assigned.build_id)
        ).cache_state != builds_pb.CACHE_STATE_PUBLISHED:
            await asyncio.sleep(0.05)


def vertices_of(client: RawClient) -> list[tuple[str, str]]:
    """Return name and last word of each step that the user saw, in order."""
    return [
        (vertex.name, vertex.error or ("cached" if vertex.cached else "done"))
        for message in client.seen
        for vertex in message.progress.vertices
        if vertex.HasField("completed_at")
    ]


async def test_corrupt_blob_in_the_shared_cache_is_repaired_with_one_line(pool, tmp_path):
    with MinioServer(tmp_path) as minio:
        options = {
            "s3_endpoint": minio.endpoint_url,
            "s3_bucket": "cache",
            "s3_access_key": minio.access_key,
            "s3_secret_key": minio.secret_key,
        }
        await pool.start_node("one", **options)
        first = await built(pool)
        await wait_published(pool, first)
        await pool.stop_node("one")

        store = Minio(f"127.0.0.1:{minio.port}", minio.access_key, minio.secret_key, secure=False)
        # Manifest and configuration stay, every layer is replaced by as many wrong bytes.
        damaged = 0
        for item in store.list_objects("cache", prefix="projects/default/blobs/", recursive=True):
            body = store.get_object("cache", item.object_name)
            data = body.read()
            body.close()
            body.release_conn()
            if not data.startswith(b"{"):
                store.put_object(
                    "cache", item.object_name, io.BytesIO(b"\0" * len(data)), len(data)
                )
                damaged += 1
        assert damaged >= 2

        agent = await pool.start_node("two", **options)
        # A new last step needs the files of the cached ones.
        second = await built(pool, STEPS + "RUN cat /made && echo third-ran\n")
        notices = [m.notice.text for m in second.seen if m.HasField("notice")]
        assert notices, "the fault was not met"
        assert len(notices) == 1, notices
        assert "cached content could not be read" in notices[0]
        seen = vertices_of(second)
        assert all(word in ("done", "cached") for _, word in seen), seen
        # Told again are only the steps that had to run because their cached files are damaged.
        told = next(index for index, m in enumerate(second.seen) if m.HasField("notice"))
        names = [v.name for m in second.seen[told:] for v in m.progress.vertices]
        assert all(name.startswith(("[3/5]", "[4/5]", "[5/5]")) for name in names), names
        result = second.seen[-1].result
        assert (result.stats.steps_total, result.stats.steps_cached) == (5, 0)
        printed = b"".join(log.data for m in second.seen for log in m.progress.logs)
        assert printed.count(b"third-ran") == 1
        await wait_published(pool, second)
        await wait_free(agent)


async def test_draining_node_lets_its_build_end_and_takes_no_other(pool):
    agent = await pool.start_node()
    client = await client_of(pool, "RUN echo begun; sleep 1; echo ended\n")
    await client.start()
    await client.until_text(b"begun")
    pool.ask_to_stop()
    await asyncio.sleep(0.1)
    assert agent.offer("other", "default", 10.0) == "the node is draining"
    assert (await client.until("result")).HasField("success")
    await client.done()
    await pool.stop_node()
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
    # The cache export that was in flight was waited for.
    build = await pool.build(client.assigned.build_id)
    assert build.cache_state == builds_pb.CACHE_STATE_PUBLISHED


async def test_drain_that_takes_too_long_loses_the_build_and_everybody_hears_why(pool):
    await pool.start_node(drain_timeout=0.5)
    client = await client_of(pool, "RUN echo begun; sleep 100\n")
    await client.start()
    await client.until_text(b"begun")
    stopping = asyncio.ensure_future(pool.stop_node())
    result = await client.until("result")
    assert result.failure.kind == node_pb.Failure.KIND_NODE
    assert result.failure.node_lost
    assert "the node was stopped" in result.failure.message
    await client.done()
    await stopping
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_LOST)


async def test_client_that_comes_while_the_node_drains_can_start_again(pool):
    await pool.start_node()
    busy = await client_of(pool, "RUN echo begun; sleep 1\n")
    await busy.start()
    await busy.until_text(b"begun")
    late = await client_of(pool)
    pool.ask_to_stop()
    await asyncio.sleep(0.1)
    await late.start()
    with pytest.raises(grpc.RpcError, match="shutting down") as caught:
        await late.until("result")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await busy.until("result")
    await busy.done()


async def logged(pool: NodePool, build_id: str) -> tuple[list[int], bytes]:
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    numbers, printed = [], b""
    request = builds_pb.LogsRequest(build_id=build_id)
    async for message in stub.Logs(request, metadata=call_metadata(), timeout=20):
        for item in message.batches:
            numbers.append(item.sequence)
            printed += b"".join(log.data for log in item.logs)
    return numbers, printed


async def test_news_and_log_survive_a_broken_link_to_the_gateway(pool):
    agent = await pool.start_node()
    client = await client_of(pool, "RUN echo begun; sleep 1; echo ended\n")
    await client.start()
    await client.until_text(b"begun")
    pool.link.cut()
    assert (await client.until("result")).HasField("success")
    await client.done()
    pool.link.up = True
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
    await wait_free(agent)
    numbers, printed = await logged(pool, client.assigned.build_id)
    assert numbers == list(range(1, len(numbers) + 1))
    assert b"ended" in printed


async def test_link_that_breaks_right_after_the_end_loses_no_news(pool):
    agent = await pool.start_node()
    for pause in (0.0, 0.002, 0.01):
        client = await client_of(pool, f"RUN echo {pause}\n")
        await client.start()
        assert (await client.until("result")).HasField("success")
        await asyncio.sleep(pause)
        pool.link.cut()
        client.vanish()
        await asyncio.sleep(0.1)
        pool.link.up = True
        await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_SUCCEEDED)
        async with asyncio.timeout(20):
            while not agent.link.connected.is_set():
                await asyncio.sleep(0.02)
    await wait_free(agent)


async def test_node_restarts_on_what_a_killed_one_left(pool):
    await pool.start_node()
    await built(pool)
    await pool.stop_node()
    data: Path = pool.folder / "one"
    (data / "journals").mkdir(exist_ok=True)
    (data / "journals" / "left").write_bytes(b"junk")
    project = data / "projects" / "default"
    (project / "context" / "new-0123").write_bytes(b"half")
    (project / "context" / "stray").mkdir()
    (project / "context" / "stray" / "no-digest").write_bytes(b"?")
    (project / "times.db").write_bytes(b"this is no database" * 100)
    (project / "times.db-wal").write_bytes(os.urandom(1000))
    agent = await pool.start_node()
    client = await built(pool)
    assert b"ran" not in b"".join(log.data for m in client.seen for log in m.progress.logs)
    runtime = (await agent._projects.runtime("default")).context_store
    await runtime.trim()
    await wait_free(agent)
    assert not (project / "context" / "new-0123").exists()


async def test_second_node_on_the_same_data_is_refused(pool, monkeypatch):
    monkeypatch.setattr("offload_builder.node.server.LOCK_SECONDS", 0.2)
    agent = await pool.start_node()
    config = NodeConfig(gateway=pool.link.address, data=agent.config.data, listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}; stop it first"):
        await NodeServer(config).__aenter__()
    await pool.stop_node()
    await pool.start_node()


async def test_project_that_cannot_be_opened_fails_its_build_and_frees_the_slot(pool):
    agent = await pool.start_node(slots=1)
    folder = agent.config.data / "projects"
    folder.mkdir(exist_ok=True)
    (folder / "default").write_bytes(b"a file where a directory belongs")
    client = await client_of(pool)
    await client.start()
    with pytest.raises(grpc.RpcError, match="the node cannot") as caught:
        await client.until("result")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await wait_free(agent)
    await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_FAILED)
    (folder / "default").unlink()
    await built(pool)
