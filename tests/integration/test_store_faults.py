"""Every fault of the shared store at every verb: a miss, in time, and over when the store is well.

MinIO is real; a proxy before it injects the faults. Patience is cut to tenths of seconds.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING

import aiohttp
import pytest
from minio import Minio

from offload_cache.contributions import Writer
from offload_cache.health import StoreHealth
from offload_cache.keys import blob_key
from offload_cache.nodestore import NodeStore
from offload_cache.presence import BlobState
from offload_cache.registry import Grant, Registry, RegistryServer
from offload_cache.s3store import S3Config, S3Store
from offload_core.digest import sha256_digest
from offload_core.errors import CacheUnavailableError, NotFoundError
from tests.fixtures.faultyproxy import FAULTS, Fault, FaultyProxy
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

READ_SECONDS = 0.4
WRITE_SECONDS = 0.8
MISS_SECONDS = 2.0
"""A 503 is tried three times; nothing else takes longer than the patience and some work."""
HEAL_SECONDS = 4.0
SMALL = 50_000
LARGE = 20 << 20  # three parts, two ranges


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="module")
def shared_proxy(minio: MinioServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(minio.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    yield shared_proxy
    shared_proxy.heal()


class Bench:
    """One node behind the proxy, and a straight way to the store."""

    def __init__(self, minio: MinioServer, proxy: FaultyProxy, root: Path) -> None:
        prefix = os.urandom(4).hex()
        self.proxy = proxy
        self.health = StoreHealth("s3", pause_seconds=0.1, longest_pause_seconds=0.8)
        self.config = S3Config(
            proxy.endpoint_url, "faults", minio.access_key, minio.secret_key, prefix=prefix,
            connect_seconds=0.5, read_seconds=READ_SECONDS, write_seconds=WRITE_SECONDS,
        )  # fmt: skip
        self.direct = S3Store(
            S3Config(
                minio.endpoint_url, "faults", minio.access_key, minio.secret_key, prefix=prefix
            )
        )
        self.root = root
        self.objects: S3Store
        self.node: NodeStore
        self.capability = ""
        self.address = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.direct.close)
            self.objects = S3Store(self.config, health=self.health, settle_seconds=0.2)
            self.node = NodeStore(self.root / "node", objects=self.objects)
            await stack.enter_async_context(self.node)
            registry = Registry()
            server = await stack.enter_async_context(RegistryServer(registry))
            project = await self.node.project("p")
            self.store = project.store
            grant = Grant(project, ("main",), "main", "key", Writer("b", "ada", "member"), True)
            self.capability = registry.grant(grant)
            self.address = server.address
            self.http = await stack.enter_async_context(aiohttp.ClientSession())
            yield self

    async def put(self, size: int = SMALL) -> tuple[str, bytes]:
        """Put a blob into the bucket; the node knows that it is there."""
        data = os.urandom(size)
        digest = sha256_digest(data)
        await self.direct.write_bytes(blob_key("p", digest), data)
        await self.store.presence.note(digest, BlobState.PRESENT, size)
        return digest, data

    async def pull(self, digest: str) -> bytes | None:
        """Do what BuildKit does; None when the blob is not to be had."""
        url = f"http://{self.address}/v2/{self.capability}/cache/blobs/{digest}"
        async with self.http.get(url) as answer:
            assert answer.status in {200, 404}
            return await answer.read() if answer.status == 200 else None

    async def used_again(self) -> None:
        """Check that the store is used within seconds, without a restart."""
        self.proxy.heal()
        digest, data = await self.put()
        async with asyncio.timeout(HEAL_SECONDS):
            while not self.objects.reachable:
                await asyncio.sleep(0.02)
        assert await self.pull(digest) == data


@pytest.fixture
async def bench(minio: MinioServer, proxy: FaultyProxy, tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(minio, proxy, tmp_path).running() as running:
        yield running


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["one range", "ranges"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_blob_that_cannot_be_read_is_a_miss(bench: Bench, fault: Fault, size: int) -> None:
    blobs = [await bench.put(size) for _ in range(1 if size == LARGE else 12)]
    bench.proxy.add(fault, "GET")
    started = time.monotonic()
    pulled = await asyncio.gather(*(bench.pull(digest) for digest, _ in blobs))
    assert time.monotonic() - started < MISS_SECONDS
    assert all(found in {None, data} for found, (_, data) in zip(pulled, blobs, strict=True))
    if fault is not Fault.CUT:  # a connection that breaks is continued where it broke
        assert set(pulled) == {None}
    await bench.used_again()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_document_and_size_that_cannot_be_had_are_misses(bench: Bench, fault: Fault) -> None:
    digest, data = await bench.put()
    await bench.store.presence.note(digest, BlobState.ABSENT)
    unknown, _ = await bench.put()
    await bench.store.presence.note(unknown, BlobState.PRESENT, 0)  # its size must be asked for
    bench.proxy.add(fault, "GET", "HEAD")
    started = time.monotonic()
    with pytest.raises(NotFoundError):
        await bench.store.read_blob(unknown, max_bytes=SMALL)
    assert await bench.store.stat_blob(unknown) in {None, SMALL}
    for _ in range(3):
        try:
            found = await bench.objects.read_bytes(blob_key("p", digest), max_bytes=SMALL)
            assert found == data or fault in {Fault.CORRUPT, Fault.SHORT}, "an unverified read"
        except (CacheUnavailableError, NotFoundError):
            pass
    assert time.monotonic() - started < MISS_SECONDS * 1.5
    await bench.used_again()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_listing_that_fails_says_so_in_time(bench: Bench, fault: Fault) -> None:
    digest, _ = await bench.put()
    bench.proxy.add(fault, "LIST")
    started = time.monotonic()
    for _ in range(3):
        try:
            listed = await bench.objects.list_objects("projects/p/", limit=10)
            assert [info.key for info in listed] in ([], [blob_key("p", digest)])
            await bench.objects.list_folders("projects/")
        except CacheUnavailableError:
            pass
    assert time.monotonic() - started < MISS_SECONDS * 1.5
    await bench.used_again()
    async with asyncio.timeout(HEAL_SECONDS):
        while True:
            try:
                assert await bench.objects.list_folders("projects/") == ["projects/p/"]
                break
            except CacheUnavailableError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["PUT", "MULTIPART"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_upload_that_fails_is_repeated_and_harms_no_read(
    bench: Bench, fault: Fault, size: int
) -> None:
    there, content = await bench.put()
    data = os.urandom(size)
    digest = await bench.store.put_blob(data)
    rule = bench.proxy.add(fault, "PUT", "MULTIPART")
    number = await bench.store.publish("a", [[digest]])
    assert number is not None
    assert bench.node.uploads is not None
    async with asyncio.timeout(HEAL_SECONDS):
        while not rule.hits:
            await asyncio.sleep(0.01)
    assert await bench.pull(there) == content
    await asyncio.sleep(0.1)
    bench.proxy.heal()
    assert await bench.node.uploads.wait_published(number, 10)
    assert await bench.direct.read_bytes(blob_key("p", digest), max_bytes=LARGE) == data


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_creation_and_deletion_that_fail_say_so(bench: Bench, fault: Fault) -> None:
    await bench.direct.write_bytes("gone", b"x" * 100)
    bench.proxy.add(fault, "CREATE", "DELETE")
    started = time.monotonic()
    try:
        created = await bench.objects.create_bytes("lock", b"mine" * 100)
    except CacheUnavailableError:
        created = None
    for deletion in (bench.objects.delete("gone"), bench.objects.delete_many(["gone", "other"])):
        with suppress(CacheUnavailableError):
            await deletion
    assert time.monotonic() - started < WRITE_SECONDS * 5
    bench.proxy.heal()
    await asyncio.sleep(0.3)
    other = await bench.direct.create_bytes("lock", b"theirs" * 100)
    assert not (created and other)
    winner = await bench.direct.read_bytes("lock", max_bytes=1000)
    assert winner in {b"mine" * 100, b"theirs" * 100}, "no half object"
    async with asyncio.timeout(HEAL_SECONDS):
        while await bench.direct.stat("gone") is not None:
            try:
                await bench.objects.delete_many(["gone"])
            except CacheUnavailableError:
                await asyncio.sleep(0.05)
    assert bench.objects.reachable


async def test_an_outage_is_one_line_and_ends_by_itself(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs = [await bench.put() for _ in range(20)]
    assert await bench.pull(blobs[0][0]) == blobs[0][1]
    capsys.readouterr()
    bench.proxy.go_down()
    started = time.monotonic()
    pulled = await asyncio.gather(*(bench.pull(digest) for digest, _ in blobs))
    assert pulled == [blobs[0][1]] + [None] * 19
    assert time.monotonic() - started < MISS_SECONDS
    await asyncio.sleep(1)
    bench.proxy.come_up()
    await bench.used_again()
    lines = [line for line in capsys.readouterr().out.splitlines() if "debug" not in line]
    assert sum("[warning" in line for line in lines) == 1, lines
    assert len(lines) <= 4, lines


async def test_many_stalled_blobs_cost_one_patience(bench: Bench) -> None:
    blobs = [await bench.put() for _ in range(40)]
    bench.proxy.add(Fault.STALL, "GET")
    started = time.monotonic()
    # Eight at a time, as BuildKit does, so the later ones begin when the first have failed.
    for start in range(0, 40, 8):
        await asyncio.gather(*(bench.pull(digest) for digest, _ in blobs[start : start + 8]))
    assert time.monotonic() - started < READ_SECONDS + 1
    await bench.used_again()


async def test_a_read_that_gets_its_bytes_outlives_those_that_stall(bench: Bench) -> None:
    digest, _ = await bench.put()
    large, data = await bench.put(LARGE)
    got = bytearray()

    def slowly(piece: bytes) -> None:
        got.extend(piece)
        time.sleep(0.01)

    reading = asyncio.create_task(bench.objects.read(blob_key("p", large), slowly))
    await asyncio.sleep(0.1)
    bench.proxy.add(Fault.SILENT, "GET", key=digest[7:])
    assert await bench.pull(digest) is None
    assert not bench.objects.reachable
    assert await reading == LARGE
    assert got == data
    await bench.used_again()


async def test_a_read_only_bucket_still_serves(bench: Bench) -> None:
    bench.proxy.add(Fault.FORBIDDEN, "PUT", "CREATE", "MULTIPART", "DELETE")
    for _ in range(4):
        with pytest.raises(CacheUnavailableError):
            await bench.objects.write_bytes("k", b"x")
    digest, data = await bench.put()
    assert bench.objects.reachable
    assert await bench.pull(digest) == data
    assert "does not allow us to write objects" in bench.objects.state


@pytest.mark.parametrize("fault", [Fault.UNKNOWN, Fault.UNCONDITIONAL], ids=lambda f: f.name)
async def test_a_store_without_conditional_writes_has_one_creator_too(
    bench: Bench, minio: MinioServer, fault: Fault
) -> None:
    await bench.direct.write_bytes("there", b"x")
    bench.proxy.add(fault, "CREATE")
    client = Minio(f"127.0.0.1:{minio.port}", minio.access_key, minio.secret_key, secure=False)
    bench.proxy.overwrite = lambda key, data: client.put_object(
        "faults", key, BytesIO(data), len(data)
    )
    other = S3Store(bench.config, settle_seconds=0.4)
    try:
        assert not await bench.objects.create_bytes("there", b"y")
        created = await asyncio.gather(
            bench.objects.create_bytes("lock", b"one"), other.create_bytes("lock", b"two")
        )
        assert sorted(created) == [False, True]
        winner = await bench.direct.read_bytes("lock", max_bytes=10)
        assert winner == (b"one" if created[0] else b"two")
        assert not await other.create_bytes("lock", b"three")
        assert await other.create_bytes("free", b"four")
    finally:
        await other.close()


async def test_a_store_that_deletes_one_by_one_is_asked_so(bench: Bench) -> None:
    for key in ("a", "b", "c"):
        await bench.direct.write_bytes(key, b"x")
    rule = bench.proxy.add(Fault.UNKNOWN, "DELETE", key="^$")  # the request for many
    await bench.objects.delete_many(["a", "b"])
    await bench.objects.delete_many(["c", "none"])
    assert rule.hits == 1
    assert await bench.direct.list_objects("", limit=5) == []


async def test_a_refusal_for_an_absent_object_is_a_plain_miss(bench: Bench) -> None:
    """AWS refuses so when the policy allows to list below a prefix only."""
    digest, _ = await bench.put()
    bench.proxy.add(Fault.FORBIDDEN, "GET", "HEAD")
    for _ in range(4):
        with pytest.raises(NotFoundError):
            await bench.objects.read_bytes("absent", max_bytes=10)
        assert await bench.objects.stat("absent") is None
    assert bench.objects.reachable
    with pytest.raises(CacheUnavailableError, match="refused"):
        await bench.objects.stat(blob_key("p", digest))
