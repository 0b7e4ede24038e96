"""An image that was saved outlives what its node keeps."""

from __future__ import annotations

import asyncio
import base64
import shutil
from typing import TYPE_CHECKING

import grpc
import pytest

from offload_cache.keys import blob_key, image_key
from offload_cache.s3store import S3Config, S3Store
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.node_service_pb2_grpc import BlobsServiceStub
from tests.fixtures.collectingprocess import collect
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

STEPS = "RUN dd if=/dev/urandom of=/big bs=1M count=2 2>/dev/null\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def built(pool: NodePool, *, save: bool) -> tuple[RawClient, str]:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, STEPS)
    client.spec.save_image = save
    await client.start()
    result = await client.until("result")
    assert not [m.notice.text for m in client.seen if m.HasField("notice")]
    await client.done()
    return client, result.success.image.digest


async def download(client: RawClient, digest: str) -> bytes:
    request = node_pb.DownloadRequest(digest=digest)
    call = client.blobs.Download(request, metadata=client.metadata)
    return b"".join([message.data async for message in call])


async def test_saved_image_is_read_after_its_time_and_without_the_disk(pool, tmp_path: Path):
    with MinioServer(tmp_path / "s3") as minio:
        options = {
            "s3_endpoint": minio.endpoint_url,
            "s3_bucket": "cache",
            "s3_access_key": minio.access_key,
            "s3_secret_key": minio.secret_key,
        }
        agent = await pool.start_node(**options)
        other, nothing = await built(pool, save=False)
        assert not nothing
        client, digest = await built(pool, save=True)
        assert digest
        async with asyncio.timeout(20):
            while agent.ended.find(other.assigned.build_id) is not None:
                await asyncio.sleep(0.05)
            while agent._store.uploads is not None and await agent._store.uploads.pending_digests(
                "default"
            ):
                await asyncio.sleep(0.05)
        await pool.stop_node()
        # The node's disk is lost, but not what it knows of builds.
        shutil.rmtree(agent.config.data / "cache")
        agent = await pool.start_node(**options)
        where = f"127.0.0.1:{agent.facts.listening.rpartition(':')[2]}"
        client.assigned.endpoints[:] = [where]
        other.assigned.endpoints[:] = [where]
        for known in (client, other):
            known.seen.clear()
            await known.rejoin(await pool.channel(known.assigned))
        with pytest.raises(grpc.RpcError, match="ended too long ago"):
            await other.until("result")
        assert (await client.until("result")).success.image.digest == digest
        assert b'"layers"' in await download(client, digest)
        found = agent.ended.find(client.assigned.build_id)
        assert found is not None
        for name, size in found.image.sizes.items():
            assert len(await download(client, name)) == size
        await client.done()


async def located(pool: NodePool, build_id: str) -> builds_pb.LocateResponse:
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    request = builds_pb.LocateRequest(build_id=build_id, saved_image=True)
    return await stub.Locate(request, metadata=call_metadata(), timeout=10)


async def reader(pool: NodePool, client: RawClient) -> None:
    """Turn to the node that the gateway names for a saved image."""
    place = (await located(pool, client.assigned.build_id)).saved_image
    client.assigned.endpoints[:] = place.endpoints
    client.assigned.server_name = place.server_name
    client.blobs = BlobsServiceStub(await pool.channel(client.assigned))
    ticket = base64.b64encode(place.ticket.SerializeToString()).decode()
    named = ("offload-build-id", client.assigned.build_id)
    client.metadata = call_metadata(named, ("offload-image-ticket", ticket))


async def test_another_node_gives_a_saved_image_until_it_is_collected(pool, tmp_path: Path):
    with MinioServer(tmp_path / "s3") as minio:
        options = {
            "s3_endpoint": minio.endpoint_url,
            "s3_bucket": "cache",
            "s3_access_key": minio.access_key,
            "s3_secret_key": minio.secret_key,
        }
        await pool.start_node("one", **options)
        plain, nothing = await built(pool, save=False)
        assert not nothing
        client, digest = await built(pool, save=True)
        build_id = client.assigned.build_id
        async with asyncio.timeout(20):
            while not (await pool.build(build_id)).image_saved:
                await asyncio.sleep(0.05)
        await pool.stop_node("one")
        other = await pool.start_node("two", **options)
        # Only what was saved is given, and nothing without the ticket.
        assert not (await located(pool, plain.assigned.build_id)).HasField("saved_image")
        await reader(pool, client)
        assert b'"layers"' in await download(client, digest)
        sizes = other.saved._open["default", digest].image.sizes
        for name, size in sizes.items():
            assert len(await download(client, name)) == size
        for wrong in (client.metadata[:-1], (*client.metadata[:-1], ("offload-image-ticket", "x"))):
            request = node_pb.DownloadRequest(digest=digest)
            with pytest.raises(grpc.RpcError, match=r"no build|ticket"):
                await client.blobs.Download(request, metadata=wrong).read()
        await pool.stop_node("two")
        shutil.rmtree(other.config.data / "cache")
        config = S3Config(minio.endpoint_url, "cache", minio.access_key, minio.secret_key)
        for days in (40, 50):
            assert await collect(config, days=days) is not None
        store = S3Store(config)
        try:
            assert await store.stat(image_key("default", digest)) is None
            assert await store.stat(blob_key("default", digest)) is None
        finally:
            await store.close()
        await pool.start_node("two", **options)
        await reader(pool, client)
        with pytest.raises(grpc.RpcError, match=r"does not have the image of build .* any more"):
            await download(client, digest)
