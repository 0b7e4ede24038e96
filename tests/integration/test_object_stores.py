"""The contract of the shared store, against every implementation; S3 is a real MinIO."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from offload_cache.health import StoreHealth
from offload_cache.s3store import S3Config, S3Store
from offload_cache.statistics import CacheStatistics
from offload_core.errors import CacheUnavailableError, NotFoundError, QuotaExceededError
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.memorystore import MemoryObjectStore
from tests.fixtures.minio import MinioServer
from tests.fixtures.versitygw import VersityServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="module")
def versity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VersityServer]:
    with VersityServer(tmp_path_factory.mktemp("versity")) as server:
        yield server


def config(minio: MinioServer | VersityServer, prefix: str = "pool/one") -> S3Config:
    return S3Config(
        minio.endpoint_url, "offload-cache", minio.access_key, minio.secret_key, prefix=prefix,
        connect_seconds=1, read_seconds=2,
    )  # fmt: skip


@pytest.fixture(params=["memory", "directory", "s3", "versitygw"])
async def objects(
    request: pytest.FixtureRequest, minio: MinioServer, versity: VersityServer, tmp_path: Path
) -> AsyncIterator[ObjectStore]:
    store: ObjectStore
    if request.param == "memory":
        store = MemoryObjectStore()
    elif request.param == "directory":
        store = DirectoryObjectStore(tmp_path / "objects")
    else:
        server = minio if request.param == "s3" else versity
        store = S3Store(config(server, prefix=f"pool/{os.urandom(4).hex()}"))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        yield store


async def test_written_bytes_are_read_whole_and_in_part(objects: ObjectStore) -> None:
    await objects.write_bytes("a/b%2Fc.json", b"hello world")
    parts: list[bytes] = []
    assert await objects.read("a/b%2Fc.json", parts.append) == 11
    assert b"".join(parts) == b"hello world"
    assert await objects.read("a/b%2Fc.json", parts.append, offset=6, length=3) == 3
    assert parts[-1] == b"wor"
    assert await objects.read_bytes("a/b%2Fc.json", max_bytes=11) == b"hello world"
    assert objects.reachable


async def test_the_last_writer_wins(objects: ObjectStore) -> None:
    await objects.write_bytes("k", b"long old content")
    await objects.write_bytes("k", b"new")
    assert await objects.read_bytes("k", max_bytes=100) == b"new"


async def test_files_are_written_in_several_parts(objects: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(20 << 20)
    (tmp_path / "file").write_bytes(data)
    assert await objects.write_file("big", tmp_path / "file") == len(data)
    got = bytearray()
    assert await objects.read("big", got.extend) == len(data)
    assert got == data


async def test_absent_objects_are_not_found(objects: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await objects.read_bytes("nothing", max_bytes=10)
    with pytest.raises(NotFoundError):
        await objects.write_file("x", tmp_path / "nothing")
    assert await objects.stat("nothing") is None
    assert await objects.list_objects("nothing/", limit=5) == []
    await objects.delete("nothing")
    assert objects.reachable


async def test_objects_that_are_too_large_are_refused(objects: ObjectStore) -> None:
    await objects.write_bytes("k", b"x" * 101)
    with pytest.raises(NotFoundError):
        await objects.read_bytes("k", max_bytes=100)


async def test_stat_and_list_tell_size_and_time(objects: ObjectStore) -> None:
    for key in ("s/main/b", "s/main/a", "s/other/c", "s/mainly"):
        await objects.write_bytes(key, b"12345")
    info = await objects.stat("s/main/a")
    assert info is not None
    assert info.size_bytes == 5
    assert abs(info.modified_at - datetime.now(UTC)) < timedelta(seconds=30)
    listed = await objects.list_objects("s/main/", limit=10)
    assert [item.key for item in listed] == ["s/main/a", "s/main/b"]
    assert [item.key for item in await objects.list_objects("s/main/", limit=1)] == ["s/main/a"]
    await objects.delete("s/main/a")
    assert await objects.stat("s/main/a") is None


async def test_what_a_sink_raises_ends_the_read(objects: ObjectStore) -> None:
    await objects.write_bytes("k", b"x" * 5_000_000)

    def full(piece: bytes) -> None:
        raise QuotaExceededError("the disk is full")

    with pytest.raises(QuotaExceededError):
        await objects.read("k", full)
    assert await objects.read_bytes("k", max_bytes=5_000_000) == b"x" * 5_000_000


async def test_a_cancelled_read_reaches_its_sink_no_more(objects: ObjectStore) -> None:
    await objects.write_bytes("k", b"x" * 30_000_000)
    pieces: list[bytes] = []

    def slow(piece: bytes) -> None:
        time.sleep(0.02)
        pieces.append(piece)

    reading = asyncio.create_task(objects.read("k", slow))
    await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    count = len(pieces)
    await asyncio.sleep(0.1)
    assert len(pieces) == count


async def test_s3_prefixes_keep_pools_apart(minio: MinioServer) -> None:
    one, two = S3Store(config(minio, "one")), S3Store(config(minio, "two/"))
    await one.write_bytes("k", b"x")
    assert await two.stat("k") is None
    assert (await one.stat("k")) is not None
    await one.close()
    await two.close()


async def test_s3_with_wrong_keys_is_unavailable_and_says_why(minio: MinioServer) -> None:
    store = S3Store(replace(config(minio), secret_key="wrong"))
    for call in (store.stat("k"), store.read_bytes("k", max_bytes=1), store.write_bytes("k", b"")):
        with pytest.raises(CacheUnavailableError) as caught:
            await call
        assert "wrong" not in caught.value.message
    assert "not reachable: access was refused" in store.state
    await store.close()


async def test_dead_s3_fails_at_once_after_some_failures_and_recovers(tmp_path: Path) -> None:
    with MinioServer(tmp_path) as server:
        statistics = CacheStatistics()
        health = StoreHealth("s3", pause_seconds=0.5)
        store = S3Store(config(server), health=health, statistics=statistics)
        await store.write_bytes("k", b"x")
        server.stop()
        for _ in range(3):
            with pytest.raises(CacheUnavailableError):
                await store.stat("k")
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(CacheUnavailableError):
                await store.read_bytes("k", max_bytes=1)
        assert time.monotonic() - started < 0.4
        assert statistics.shared_failures == 3
        server.start()
        async with asyncio.timeout(10):
            while not store.reachable:
                await asyncio.sleep(0.05)
        assert await store.read_bytes("k", max_bytes=1) == b"x"
        assert store.state == "the shared cache is reachable"
        await store.close()


async def test_s3_that_accepts_and_never_answers_is_given_up_in_time(minio: MinioServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = S3Store(replace(config(minio), endpoint_url=url))
        started = time.monotonic()
        with pytest.raises(CacheUnavailableError):
            await store.stat("k", timeout=0.3)
        assert time.monotonic() - started < 1
        assert store.reachable  # the caller's patience was short
        reads = [store.read(f"k{number}", lambda _: None) for number in range(30)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(result, CacheUnavailableError) for result in results)
        # Its own patience, 2 s here, is spent once: also by those that wait for a thread.
        assert time.monotonic() - started < 4
        assert not store.reachable
        with pytest.raises(CacheUnavailableError):
            await store.read("k", lambda _: None)
        assert time.monotonic() - started < 4
        await store.close()


async def test_a_listing_can_begin_after_a_key(objects: ObjectStore) -> None:
    for name in ("a/1", "a/2", "a/3", "b/1"):
        await objects.write_bytes(name, b"x")
    found = await objects.list_objects("a/", limit=10, start_after="a/1")
    assert [info.key for info in found] == ["a/2", "a/3"]
    found = await objects.list_objects("a/", limit=10, start_after="a/15")
    assert [info.key for info in found] == ["a/2", "a/3"]
    assert await objects.list_objects("a/", limit=10, start_after="a/3") == []


async def test_a_range_beyond_the_end_is_no_failure_of_the_store(objects: ObjectStore) -> None:
    await objects.write_bytes("k", b"hello")
    parts: list[bytes] = []
    for _ in range(5):
        with contextlib.suppress(NotFoundError):
            assert await objects.read("k", parts.append, offset=100, length=5) == 0
    assert b"".join(parts) == b""
    assert objects.reachable


async def test_waiting_for_a_thread_is_no_failure_of_the_store(minio: MinioServer) -> None:
    store = S3Store(config(minio), readers=1)
    release = threading.Event()
    try:
        await store.write_bytes("k", b"x")
        reading = asyncio.create_task(store.read("k", lambda piece: release.wait(10) and None))
        await asyncio.sleep(0.2)
        for _ in range(4):
            with pytest.raises(CacheUnavailableError, match="transfers"):
                await store.stat("k", timeout=0.05)
        assert store.reachable
        release.set()
        assert await reading == 1
    finally:
        release.set()
        await store.close()


async def test_of_many_creators_of_one_object_one_succeeds(objects: ObjectStore) -> None:
    assert await objects.create_bytes("locks/a", b"first")
    assert not await objects.create_bytes("locks/a", b"second")
    assert await objects.read_bytes("locks/a", max_bytes=100) == b"first"
    won = await asyncio.gather(*(objects.create_bytes("locks/b", b"%d" % n) for n in range(6)))
    assert sum(won) == 1
    assert await objects.read_bytes("locks/b", max_bytes=100) == b"%d" % won.index(True)
    await objects.delete("locks/b")
    assert await objects.create_bytes("locks/b", b"again")


async def test_folders_are_listed_one_level_deep(objects: ObjectStore) -> None:
    for key in ("p/one/blobs/x", "p/two/y", "p/file", "q/three/z"):
        await objects.write_bytes(key, b"x")
    assert await objects.list_folders("p/") == ["p/one/", "p/two/"]
    assert await objects.list_folders("") == ["p/", "q/"]
    assert await objects.list_folders("p/one/blobs/") == []
    assert await objects.list_folders("nothing/") == []


async def test_many_objects_are_deleted_at_once(
    objects: ObjectStore, request: pytest.FixtureRequest
) -> None:
    count = 1_005 if "[s3]" in request.node.name else 30  # one request takes 1,000
    keys = [f"d/{number:04}" for number in range(count)]
    for start in range(0, len(keys), 100):
        await asyncio.gather(*(objects.write_bytes(k, b"") for k in keys[start : start + 100]))
    await objects.write_bytes("kept", b"x")
    await objects.delete_many([*keys, "d/there is none"])
    assert await objects.list_objects("d/", limit=5) == []
    assert await objects.stat("kept") is not None
    await objects.delete_many([])


async def test_one_of_many_creates_an_object(objects: ObjectStore) -> None:
    created = await asyncio.gather(
        *(objects.create_bytes("pool/lock", bytes([i])) for i in range(8))
    )
    assert created.count(True) == 1
    assert await objects.read_bytes("pool/lock", max_bytes=9) == bytes([created.index(True)])
    assert not await objects.create_bytes("pool/lock", b"late")
    await objects.delete("pool/lock")
    assert await objects.create_bytes("pool/lock", b"next")
