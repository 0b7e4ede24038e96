from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from offload_cache.keys import blob_key
from offload_cache.nodestore import NodeStore
from offload_core.digest import sha256_digest
from offload_core.errors import DigestMismatchError, NotFoundError, UsageError
from tests.fixtures.memorystore import MemoryObjectStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DATA = b"layer " * 1000
DIGEST = sha256_digest(DATA)


async def upload(node: NodeStore, data: bytes = DATA) -> None:
    store = (await node.project("p")).store
    number = await store.publish("n" + sha256_digest(data), [[await store.put_blob(data)]])
    assert number is not None
    assert node.uploads is not None
    assert await node.uploads.wait_published(number, 10)


async def test_a_blob_uploaded_by_one_node_is_read_by_another(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await upload(one)
        store = (await two.project("p")).store
        assert await store.stat_blob(DIGEST) == len(DATA)
        assert not store.disk.has(DIGEST)
        assert (await store.open_blob(DIGEST)).read_bytes() == DATA
        assert store.disk.has(DIGEST)


async def test_projects_do_not_see_each_others_blobs(make_node: Callable[..., NodeStore]) -> None:
    async with make_node("one") as node:
        await upload(node)
        other = (await node.project("q")).store
        assert await other.stat_blob(DIGEST) is None
        with pytest.raises(NotFoundError):
            await other.open_blob(DIGEST)
        with pytest.raises(UsageError):
            await node.project("../p")


async def test_parallel_readers_share_one_fetch(make_node: Callable[..., NodeStore]) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await upload(one)
        store = (await two.project("p")).store
        gone = asyncio.create_task(store.open_blob(DIGEST))
        paths = asyncio.gather(*(store.open_blob(DIGEST) for _ in range(5)))
        await asyncio.sleep(0)
        assert len(store._flights) == 1
        gone.cancel()
        assert len(set(await paths)) == 1
        with pytest.raises(asyncio.CancelledError):
            await gone


@pytest.mark.parametrize("bad", [DATA[:-1], DATA[:-1] + b"?", DATA + b"more", b""])
async def test_a_corrupt_object_is_a_miss_and_is_not_asked_for_again(
    tmp_path: Path, bad: bytes
) -> None:
    objects = MemoryObjectStore()
    async with NodeStore(tmp_path, objects=objects) as node:
        await objects.write_bytes(blob_key("p", DIGEST), bad)
        store = (await node.project("p")).store
        with pytest.raises(NotFoundError):
            await store.open_blob(DIGEST)
        assert node.statistics.corrupt_objects == 1
        assert await store.stat_blob(DIGEST) is None
        assert not store.is_offerable(DIGEST)
        assert not store.disk.has(DIGEST)


async def test_an_upload_repairs_an_object_that_was_found_corrupt(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with NodeStore(tmp_path, objects=objects) as node:
        await objects.write_bytes(blob_key("p", DIGEST), b"!" * len(DATA))
        store = (await node.project("p")).store
        with pytest.raises(NotFoundError):
            await store.open_blob(DIGEST)
        await upload(node)
        assert await objects.read_bytes(blob_key("p", DIGEST), max_bytes=1 << 20) == DATA


async def test_a_large_object_is_fetched_in_ranges(tmp_path: Path) -> None:
    data = bytes(range(256)) * (1 << 18) + b"tail"  # 64 MiB and a bit
    digest = sha256_digest(data)
    objects = MemoryObjectStore()
    async with NodeStore(tmp_path, objects=objects) as node:
        await objects.write_bytes(blob_key("p", digest), data)
        store = (await node.project("p")).store
        assert (await store.open_blob(digest)).stat().st_size == len(data)
        await objects.write_bytes(blob_key("p", DIGEST), data)
        with pytest.raises(NotFoundError):
            await store.open_blob(DIGEST)


async def test_a_store_that_is_away_is_a_miss(
    make_node: Callable[..., NodeStore], tmp_path: Path
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await upload(one)
        (tmp_path / "shared").rename(tmp_path / "away")
        (tmp_path / "shared").write_text("not a directory")
        (tmp_path / "shared").unlink()
        (tmp_path / "shared").symlink_to(tmp_path / "shared")  # ELOOP: neither there nor absent
        store = (await two.project("p")).store
        for _ in range(4):
            assert await store.stat_blob(DIGEST) is None
        with pytest.raises(NotFoundError):
            await store.open_blob(DIGEST)
        assert "is not reachable" in two.shared_state
        (tmp_path / "shared").unlink()
        (tmp_path / "away").rename(tmp_path / "shared")
        await asyncio.sleep(0.25)
        assert await store.stat_blob(sha256_digest(b"other")) is None
        assert two.shared_state == "the shared cache is reachable"


async def test_no_shared_store_means_disk_only(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False) as node:
        store = (await node.project("p")).store
        assert await store.stat_blob(DIGEST) is None
        digest = await store.put_blob(DATA)
        assert await store.publish("n", [[digest]]) is None
        assert (await store.open_blob(digest)).read_bytes() == DATA
        assert node.shared_state == ""


async def test_writer_refuses_a_wrong_digest_and_aborts_at_the_end(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        store = (await node.project("p")).store
        async with store.ingest() as writer:
            await writer.write(b"abc")
            with pytest.raises(DigestMismatchError):
                await writer.commit(DIGEST)
        async with store.ingest() as writer:
            await writer.write(DATA)
        assert not any((store.disk.root / "ingest").iterdir())
        assert not store.disk.has(DIGEST)


async def test_a_full_project_is_trimmed_but_keeps_what_waits_for_its_upload(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(max_project_bytes=10_000) as node:
        store = (await node.project("p")).store
        waiting = await store.put_blob(b"w" * 6_000)
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        await store.publish("n", [[waiting]])
        free = [await store.put_blob(bytes([i]) * 3_000) for i in range(3)]
        async with asyncio.timeout(5):
            while store.disk.over_limit:
                await asyncio.sleep(0.01)
        assert store.disk.has(waiting)
        assert sum(store.disk.has(digest) for digest in free) < 3
        node.uploads._pause_until = 0.0


async def test_blobs_are_offered_again_soon_after_a_reboot(
    make_node: Callable[..., NodeStore], tmp_path: Path
) -> None:
    async with make_node(shared=False) as node:
        await (await node.project("p")).store.put_blob(DATA)
    (tmp_path / "one" / "projects" / "p" / "boot").write_text("another-boot")
    async with make_node(shared=False) as node:
        store = (await node.project("p")).store
        async with asyncio.timeout(5):
            while not store.is_offerable(DIGEST):
                await asyncio.sleep(0.01)
