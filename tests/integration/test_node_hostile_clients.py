"""What a hostile client sends is refused by name and harms only its own build."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import zstandard

from offload_core.filemode import MODE_DEVICE, MODE_DIR
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_builder.node.agent import NodeAgent


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def client_of(pool: NodePool, steps: str = "", **options: Any) -> RawClient:
    assigned = await pool.assigned(**options)
    return RawClient(await pool.channel(assigned, **options), assigned, steps)


async def refused(client: RawClient, text: str) -> node_pb.Failure:
    result = await client.until("result")
    assert text in result.failure.message, result
    assert "internal error" not in result.failure.message
    return result.failure


BAD_ENTRIES = [
    {"path": "../escape", "sha256": b"x" * 32},
    {"path": "/etc/passwd", "sha256": b"x" * 32},
    {"path": "a//b", "sha256": b"x" * 32},
    {"path": "a\0b", "sha256": b"x" * 32},
    {"path": "", "sha256": b"x" * 32},
    {"path": "short", "sha256": b"x"},
    {"path": "negative", "sha256": b"x" * 32, "size_bytes": -1},
    {"path": "nothing", "size_bytes": 5},
    {"path": "link", "link_name": "../../etc/shadow"},
]


async def test_malformed_listings_end_the_build_with_a_sentence(pool):
    agent = await pool.start_node()
    for entry in BAD_ENTRIES:
        client = await client_of(pool)
        await client.start()
        request = await client.until("context_request")
        message = node_pb.ContextEntries(
            request_id=request.request_id,
            entries=[node_pb.ContextEntry(**{"mode": 0o644, **entry})],
            last=True,
        )
        await client.send(context_entries=message)
        await refused(client, "the client sent")
        client.vanish()
    await wait_free(agent)


async def test_unordered_listing_is_refused_by_buildkit_and_no_crash(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    client.files["a"] = (b"a" * 10, 0o100644)
    await client.start()
    request = await client.until("context_request")
    message = client.entries(request.request_id)
    message.entries.reverse()
    await client.send(context_entries=message)
    result = await client.until("result")
    assert result.HasField("failure")
    client.vanish()
    await wait_free(agent)


async def test_listing_that_nobody_asked_for_ends_the_build(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    await client.until("context_request")
    await client.send(context_entries=node_pb.ContextEntries(request_id=77, last=True))
    await refused(client, "not asked for")
    client.vanish()
    await wait_free(agent)


async def test_inline_file_with_a_path_that_leaves_is_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.open()
    file = node_pb.InlineFile(local_name="dockerfile", path="../../x", data=b"FROM scratch\n")
    await client.send(
        start=node_pb.Start(ticket=client.assigned.ticket, spec=client.spec, inline_files=[file])
    )
    await refused(client, "bad path")
    client.vanish()
    await wait_free(agent)


async def upload_error(client: RawClient, *requests: node_pb.UploadRequest) -> str:
    call = client.blobs.Upload(metadata=client.metadata)
    client.uploads.append(call)
    with pytest.raises(grpc.RpcError) as caught:
        for request in requests:
            await call.write(request)
        await call.done_writing()
        async with asyncio.timeout(10):
            while await call.read() is not grpc.aio.EOF:
                pass
        raise AssertionError("the node took it all")
    assert caught.value.code() is not grpc.StatusCode.INTERNAL, caught.value.details()
    return str(caught.value.details())


def batch(*contents: bytes, digests: list[bytes] | None = None, **options: Any) -> Any:
    values = {
        "sha256": digests or [hashlib.sha256(data).digest() for data in contents],
        "sizes": [len(data) for data in contents],
        "data": b"".join(contents),
    }
    return node_pb.UploadRequest(batch=node_pb.BlobBatch(**values | options))


def chunk(**values: Any) -> node_pb.UploadRequest:
    return node_pb.UploadRequest(chunk=node_pb.BlobChunk(**values))


HOSTILE_UPLOADS = {
    "no sizes": (lambda d: [batch(b"x", sizes=[])], "malformed"),
    "negative size": (lambda d: [batch(b"x", sizes=[-1])], "malformed"),
    "sizes beyond the data": (lambda d: [batch(b"x", sizes=[2**60])], "add up"),
    "other bytes": (lambda d: [batch(b"evil", digests=[d])], "changed while it was sent"),
    "not zstd": (lambda d: [batch(b"x", zstd=True)], "damaged"),
    "zip bomb": (
        lambda d: [batch(b"x", data=zstandard.compress(bytes(65 << 20)), zstd=True)],
        "too large",
    ),
    "unasked": (lambda d: [chunk(sha256=b"q" * 32, size_bytes=1, data=b"q")], "not asked for"),
    "other size": (lambda d: [chunk(sha256=d, size_bytes=2**62, data=b"q")], "another size"),
    "gap": (lambda d: [chunk(sha256=d, size_bytes=2, offset_bytes=1, data=b"q")], "out of order"),
    "negative offset": (
        lambda d: [chunk(sha256=d, size_bytes=2, offset_bytes=-1, data=b"q")],
        "out of order",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_UPLOADS)
async def test_hostile_upload_ends_its_build_with_a_sentence(pool, case):
    make, sentence = HOSTILE_UPLOADS[case]
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    wanted = list((await client.until("need_blobs")).sha256)
    assert sentence in await upload_error(client, *make(wanted[0]))
    await refused(client, sentence)
    client.vanish()
    await wait_free(agent)


async def test_refused_upload_is_read_on_until_the_result_has_said_why(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    wanted = list((await client.until("need_blobs")).sha256)
    call = client.blobs.Upload(metadata=client.metadata)
    client.uploads.append(call)
    await call.write(batch(b"evil", digests=[wanted[0]]))
    for _ in range(30):
        await call.write(chunk(sha256=wanted[0], size_bytes=1 << 20, data=bytes(1 << 20)))
    failure = await refused(client, "changed while it was sent")
    assert failure.kind == node_pb.Failure.KIND_CONTEXT_CHANGED
    assert not call.done()
    client.vanish()
    await wait_free(agent)


async def test_chunks_beyond_the_listed_size_are_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    data, _ = client.files["busybox"]
    await client.start()
    wanted = list((await client.until("need_blobs")).sha256)
    whole = client.chunk(wanted[0], 0, len(data) - 1)
    more = chunk(sha256=wanted[0], size_bytes=len(data), offset_bytes=len(data) - 1, data=b"ab")
    assert "out of order" in await upload_error(client, whole, more)
    client.vanish()
    await wait_free(agent)


async def test_another_members_build_id_is_unknown_to_the_blob_service(pool):
    agent = await pool.start_node()
    token = await pool.gateway.create_token("mallory", identity_pb.ROLE_MEMBER)
    mallory = await pool.gateway.login(token)
    client = await client_of(pool, "RUN sleep 30\n")
    client.spec.outputs.add(type=Output.TYPE_IMAGE)
    await client.start()
    await client.until("context_request")
    thief = RawClient(await pool.channel(client.assigned, mallory), client.assigned)
    calls = [
        thief.blobs.Download(
            node_pb.DownloadRequest(digest="sha256:" + "0" * 64), metadata=thief.metadata
        ),
        thief.blobs.ReadOutput(node_pb.ReadOutputRequest(output_index=0), metadata=thief.metadata),
        thief.blobs.Upload(metadata=thief.metadata),
        # A build that does not exist sounds the same.
        thief.blobs.ReadOutput(
            node_pb.ReadOutputRequest(),
            metadata=call_metadata(("offload-build-id", "../../etc")),
        ),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError, match=r"no build .* of yours") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    # The ticket of somebody else is of no use, either.
    assigned = await pool.assigned()
    stolen = RawClient(await pool.channel(assigned, mallory), assigned)
    await stolen.start()
    with pytest.raises(grpc.RpcError, match="another member"):
        await stolen.until("result")
    agent.cancel(assigned.build_id, "not taken")
    client.vanish()
    await wait_free(agent)


async def test_certificate_of_a_node_builds_nothing(pool):
    await pool.start_node()
    keys = await pool.gateway.enroll_node("admin")
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned, keys), assigned)
    await client.start()
    with pytest.raises(grpc.RpcError, match="certificate of a node") as caught:
        await client.until("result")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_downloads_of_wrong_places_are_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    client.spec.outputs.add(type=Output.TYPE_IMAGE)
    await client.start()
    image = (await client.until("result")).success.image
    for request, code in [
        (node_pb.DownloadRequest(digest="../../etc/passwd"), grpc.StatusCode.NOT_FOUND),
        (node_pb.DownloadRequest(digest="sha256:" + "1" * 64), grpc.StatusCode.NOT_FOUND),
        (
            node_pb.DownloadRequest(digest=image.digest, offset_bytes=-5),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            node_pb.DownloadRequest(digest=image.digest, offset_bytes=2**40),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            await client.blobs.Download(request, metadata=client.metadata).read()
        assert caught.value.code() is code
    end = node_pb.DownloadRequest(digest=image.digest, offset_bytes=image.size_bytes)
    head = await client.blobs.Download(end, metadata=client.metadata).read()
    assert head.total_bytes == image.size_bytes
    assert not head.data
    await client.done()
    await wait_free(agent)


async def test_wrong_beginnings_of_a_build_are_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.open()
    await client.send(done=node_pb.Done())
    with pytest.raises(grpc.RpcError, match="must be Start"):
        await client.until("result")
    other = RawClient(await pool.channel(client.assigned), client.assigned)
    other.spec.outputs.add(type=Output.TYPE_OCI, attributes={"tar": "false"})
    await other.start()
    await refused(other, "tar=false")
    other.vanish()
    await wait_free(agent)


async def test_device_and_directory_entries_are_built(pool):
    agent = await pool.start_node()
    client = await client_of(pool, "COPY dir /dir\nRUN test -c /dir/null\n")
    await client.start()
    request = await client.until("context_request")
    message = client.entries(request.request_id)
    message.entries.add(path="dir", mode=MODE_DIR | 0o755, modified_at_unix_ns=10**18)
    message.entries.add(
        path="dir/null", mode=MODE_DEVICE | (1 << 21) | 0o666, device_major=1, device_minor=3
    )
    await client.send(context_entries=message)
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    await wait_free(agent)


async def slow_reader(pool: NodePool, agent: NodeAgent) -> RawClient:
    client = await client_of(
        pool, "RUN i=0; while [ $i -lt 20000 ]; do echo $i-xxxxxxxx; i=$((i+1)); done\n"
    )
    await client.start()
    return client


async def test_client_that_reads_slowly_gets_the_whole_log_although_the_gateway_has_it(pool):
    agent = await pool.start_node()
    client = await slow_reader(pool, agent)
    await client.until("need_blobs")
    await client.upload([hashlib.sha256(client.files["busybox"][0]).digest()])
    # Nothing is read until the gateway has the whole log and the journal would be gone.
    async with asyncio.timeout(30):
        while (await pool.build(client.assigned.build_id)).stats.steps_total < 3:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
    result = await client.until("result")
    assert result.HasField("success"), result
    printed = b"".join(log.data for message in client.seen for log in message.progress.logs)
    assert b"19999-xxxxxxxx" in printed or b"output clipped" in printed
    numbers = [m.progress.sequence for m in client.seen if m.HasField("progress")]
    assert numbers == list(range(1, len(numbers) + 1))
    await client.done()
    await wait_free(agent)
