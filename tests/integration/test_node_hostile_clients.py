"""What a hostile client sends is refused by name and harms only its own build."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import zstandard

from offload_core.filemode import MODE_CHAR_DEVICE, MODE_DEVICE, MODE_DIR, MODE_SYMLINK
from offload_core.listing import Page, encode_page
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from tests.fixtures.contentclients import batch
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


def one(path: str = "file", **columns: Any) -> bytes:
    """Return a page of one file; `columns` replace what is right of it."""
    right = {"paths": [path], "modes": [0o644], "sizes_bytes": [1], "digests": b"x" * 32}
    return encode_page(Page(**right | columns))


def names(*paths: str, mode: int = MODE_DIR | 0o755) -> bytes:
    """Return a page of directories."""
    return encode_page(Page(paths, [mode] * len(paths), [0] * len(paths), b""))


DEVICE = MODE_DEVICE | MODE_CHAR_DEVICE | 0o666
BAD_LISTINGS = {
    "above the root": ([one("../escape")], "bad path"),
    "absolute": ([one("/etc/passwd")], "bad path"),
    "empty part": ([one("a//b")], "bad path"),
    "dot": ([one("./a")], "bad path"),
    "no path": ([one("")], "bad path"),
    "too long": ([one("a" * 5000)], "bad path"),
    "short digest": ([one(digests=b"x")], "damaged listing"),
    "no digest": ([one(digests=b"")], "damaged listing"),
    "more modes than paths": ([one(modes=[0o644, 0o644])], "damaged listing"),
    "no page at all": ([b"\xff" * 50], "damaged listing"),
    "hard link that leaves": ([one(digests=b"", links={0: "../../etc/shadow"})], "bad path"),
    "link of no entry": ([one(links={7: "x"})], "damaged listing"),
    "link that is empty": (
        [one(modes=[MODE_SYMLINK], sizes_bytes=[0], digests=b"", links={0: ""})],
        "malformed",
    ),
    "out of order": ([names("b", "a")], "out of order"),
    "twice": ([names("a", "a")], "out of order"),
    "out of order over pages": ([names("b"), names("a")], "out of order"),
    "below a file": ([names("a", "a/b", mode=0o644)], "not in a directory"),
    "below nothing": ([names("a/b")], "not in a directory"),
    "behind a link": (
        [
            encode_page(
                Page(["a", "a/b"], [MODE_SYMLINK | 0o777, 0o644], [0, 1], b"x" * 32, {0: "/etc"})
            )
        ],
        "not in a directory",
    ),
    "device": (
        [encode_page(Page(["null"], [DEVICE], [0], b"", devices={0: (1, 3)}))],
        "the device 'null'",
    ),
    "attribute that is no content": (
        [one(xattrs={0: {"trusted.overlay.redirect": b"/etc"}})],
        "malformed",
    ),
}


async def test_malformed_listings_end_the_build_with_a_sentence(pool):
    agent = await pool.start_node()
    for pages, sentence in BAD_LISTINGS.values():
        client = await client_of(pool)
        await client.start()
        request = await client.until("context_request")
        await client.list(request.request_id, *pages)
        await refused(client, sentence)
        client.vanish()
    await wait_free(agent)


async def test_page_that_is_not_the_announced_one_is_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    request = await client.until("context_request")
    await client.list(request.request_id, one("announced"))
    client._pages = [one("other")]
    await refused(client, "another page")
    client.vanish()
    await wait_free(agent)


async def test_endless_listing_is_refused_by_its_limit(pool):
    """A hundred million entries have some three million names of pages; two per cent are enough."""
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    request = await client.until("context_request")
    some = b"".join(number.to_bytes(32) for number in range(30_000))
    for _ in range(3):
        listing = node_pb.ContextListing(request_id=request.request_id, pages=some)
        await client.send(context_listing=listing)
    await refused(client, "too large")
    client.vanish()
    await wait_free(agent)


async def test_page_that_unpacks_to_very_much_is_refused(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    request = await client.until("context_request")
    await client.list(request.request_id, one())
    await client.until("need_pages")
    bomb = node_pb.ContextPage(
        request_id=request.request_id, data=zstandard.compress(bytes(64 << 20)), zstd=True
    )
    await client.send(context_page=bomb)
    await refused(client, "at most")
    client.vanish()
    await wait_free(agent)


async def test_listing_and_page_that_nobody_asked_for_end_the_build(pool):
    agent = await pool.start_node()
    for message in (
        {"context_listing": node_pb.ContextListing(request_id=77, last=True)},
        {"context_page": node_pb.ContextPage(request_id=77, data=b"x")},
    ):
        client = await client_of(pool)
        await client.start()
        await client.until("context_request")
        await client.send(**message)
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


def raw(**values: Any) -> node_pb.UploadRequest:
    return node_pb.UploadRequest(batch=node_pb.BlobBatch(**values))


HOSTILE_UPLOADS = {
    "no sizes": (lambda d: [raw(sha256=[d], data=b"x")], "malformed"),
    "negative size": (lambda d: [raw(sha256=[d], sizes=[-1])], "malformed"),
    "sizes beyond the data": (lambda d: [raw(sha256=[d], sizes=[2**60], data=b"x")], "add up"),
    "not zstd": (lambda d: [raw(sha256=[d], sizes=[1], data=b"x", zstd=True)], "damaged"),
    "zip bomb": (
        lambda d: [
            raw(sha256=[d], sizes=[65 << 20], data=zstandard.compress(bytes(65 << 20)), zstd=True)
        ],
        "add up",
    ),
    "unasked": (lambda _: [batch(b"nobody wants this")], "not asked for"),
}


@pytest.mark.parametrize("case", HOSTILE_UPLOADS)
async def test_hostile_upload_ends_its_build_with_a_sentence(pool, case):
    make, sentence = HOSTILE_UPLOADS[case]
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    await client.until("need_blobs")
    digest = hashlib.sha256(client.contents[0]).digest()
    assert sentence in await upload_error(client, *make(digest))
    await refused(client, sentence)
    client.vanish()
    await wait_free(agent)


async def test_wrong_content_is_refused_counted_and_named(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    await client.until("need_blobs")
    call = client.blobs.Upload(metadata=client.metadata)
    client.uploads.append(call)
    await call.write(batch(b"evil", digests=[hashlib.sha256(client.contents[0]).digest()]))
    answer = await call.read()
    assert (answer.stored_blobs, answer.stored_bytes) == (0, 0)
    result = await client.until("result")
    assert result.failure.kind == node_pb.Failure.KIND_CONTEXT_CHANGED
    assert result.failure.message.startswith('"busybox" of the build context changed')
    assert result.stats.context_refused_blobs == 1
    client.vanish()
    await wait_free(agent)


async def test_file_that_the_client_cannot_deliver_ends_the_build_with_its_sentence(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    need = await client.until("need_blobs")
    failure = node_pb.BlobFailure(request_id=need.request_id, entry=0, message="busybox is gone")
    await client.send(blob_failure=failure)
    found = await refused(client, "busybox is gone")
    assert found.kind == node_pb.Failure.KIND_CONTEXT_CHANGED
    client.vanish()
    await wait_free(agent)


async def test_refused_upload_is_read_on_until_the_result_has_said_why(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    await client.until("need_blobs")
    call = client.blobs.Upload(metadata=client.metadata)
    client.uploads.append(call)
    for _ in range(30):
        await call.write(batch(bytes(1 << 20)))
    await refused(client, "not asked for")
    assert not call.done()
    client.vanish()
    await wait_free(agent)


async def test_upload_stream_that_breaks_is_followed_by_another(pool):
    agent = await pool.start_node()
    client = await client_of(pool)
    await client.start()
    need = await client.until("need_blobs")
    broken = client.blobs.Upload(metadata=client.metadata)
    await broken.wait_for_connection()
    broken.cancel()
    await client.upload(need.entries)
    assert (await client.until("result")).HasField("success")
    await client.done()
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


async def slow_reader(pool: NodePool, agent: NodeAgent) -> RawClient:
    client = await client_of(
        pool, "RUN i=0; while [ $i -lt 20000 ]; do echo $i-xxxxxxxx; i=$((i+1)); done\n"
    )
    await client.start()
    return client


async def test_client_that_reads_slowly_gets_the_whole_log_although_the_gateway_has_it(pool):
    agent = await pool.start_node()
    client = await slow_reader(pool, agent)
    await client.upload((await client.until("need_blobs")).entries)
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
