from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import threading
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from offload_cache import uploads
from offload_cache.collection.documents import CondemnedDocument
from offload_cache.keys import blob_key, named_key
from offload_cache.nodestore import NodeStore
from offload_cache.uploadtable import UploadItem
from offload_core.digest import sha256_digest
from tests.fixtures.memorystore import MemoryObjectStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_cache.uploadtable import QueuedUpload


class WriteOrder(MemoryObjectStore):
    """Remembers the order of writes, and is slow with the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    async def write_file(self, key: str, path: Path) -> int:
        await asyncio.sleep(0.05)
        return await super().write_file(key, path)

    async def write_bytes(self, key: str, data: bytes) -> None:
        await super().write_bytes(key, data)
        self.written.append(key)


async def publish(node: NodeStore, name: str, *blobs: bytes) -> int:
    store = (await node.project("p")).store
    digests = [sha256_digest(blob) for blob in blobs]
    document = UploadItem.for_document(1, f"documents/{name}", b"{}")
    # As a build does: a full disk must not lose what is not in the queue yet.
    with store.lease(digests):
        for blob in blobs:
            await store.put_blob(blob)
        number = await store.publish(name, [digests, [document]])
    assert number is not None
    return number


async def test_a_document_follows_all_blobs_that_it_names(tmp_path: Path) -> None:
    objects = WriteOrder()
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        number = await publish(node, "a", *(bytes([i]) for i in range(10)))
        assert await node.uploads.wait_published(number, 10)
        written = [key for key in objects.written if "/leases/" not in key]
        assert len(written) == 11
        assert written[-1] == "documents/a"
        assert await node.uploads.pending_count() == 0


async def test_publications_survive_a_restart(make_node: Callable[..., NodeStore]) -> None:
    async with make_node() as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        number = await publish(node, "a", b"blob")
        assert not await node.uploads.wait_published(number, 0.01)
    async with make_node() as node:
        assert node.uploads is not None
        assert await node.uploads.wait_published(number, 10)
        assert node.objects is not None
        assert await node.objects.stat(blob_key("p", sha256_digest(b"blob"))) is not None


async def test_uploads_wait_for_a_store_that_is_away(
    make_node: Callable[..., NodeStore], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.symlink_to(shared)  # ELOOP
    async with make_node() as node:
        assert node.uploads is not None
        number = await publish(node, "a", b"one", b"two")
        assert not await node.uploads.wait_published(number, 0.3)
        assert await node.uploads.pending_digests("p") == {
            sha256_digest(b"one"),
            sha256_digest(b"two"),
        }
        shared.unlink()
        assert await node.uploads.wait_published(number, 20)


async def test_a_blob_that_the_store_has_is_not_sent_again(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        for node in (one, two):
            assert node.uploads is not None
            assert await node.uploads.wait_published(await publish(node, "a", b"blob"), 10)
        assert one.statistics.shared_writes_skipped == 0
        assert two.statistics.shared_writes_skipped == 1


async def test_a_publication_whose_blob_is_gone_is_given_up(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node() as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        gone = await publish(node, "a", b"gone")
        other = await publish(node, "b", b"other")
        (await node.project("p")).store.disk.delete(sha256_digest(b"gone"))
        node.uploads._pause_until = 0.0
        node.uploads._wake.set()
        assert await node.uploads.wait_published(other, 10)
        assert not await node.uploads.wait_published(gone, 10)
        assert node.objects is not None
        assert await node.objects.stat("documents/a") is None


async def test_of_many_waiting_publications_of_one_name_two_are_kept(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node() as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        numbers = [await publish(node, "a", bytes([i])) for i in range(5)]
        assert await node.uploads.pending_count() == 4
        assert not await node.uploads.wait_published(numbers[2], 10)
        node.uploads._pause_until = 0.0
        node.uploads._wake.set()
        assert await node.uploads.wait_published(numbers[-1], 10)
        assert await node.uploads.pending_count() == 0


async def test_shared_blobs_of_two_publications_are_uploaded_once(tmp_path: Path) -> None:
    objects = WriteOrder()
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        numbers = [await publish(node, name, b"same") for name in "abc"]
        for number in numbers:
            assert await node.uploads.wait_published(number, 10)
        assert objects.written.count(blob_key("p", sha256_digest(b"same"))) == 1


async def test_a_lapsed_lease_makes_a_publication_begin_with_its_first_blob(
    tmp_path: Path,
) -> None:
    class Lapsing(MemoryObjectStore):
        """Loses the blob while the document is on its way, as a collection might."""

        lapsed = False

        async def write_bytes(self, key: str, data: bytes) -> None:
            await super().write_bytes(key, data)
            if key == "documents/a" and not self.lapsed:
                self.lapsed = True
                assert node.uploads is not None
                (publishing,) = node.uploads._publishing.values()
                publishing._lease._until = float("-inf")
                node.uploads._sightings.forget("p", sha256_digest(b"blob"))
                await self.delete(blob_key("p", sha256_digest(b"blob")))

    objects = Lapsing()
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        number = await publish(node, "a", b"blob")
        assert await node.uploads.wait_published(number, 10)
        assert objects.lapsed
        assert await objects.stat(blob_key("p", sha256_digest(b"blob"))) is not None


async def test_a_publication_waits_for_a_collection_that_deletes_its_blobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "CONDEMNED_WAIT_SECONDS", 0.1)
    digest = sha256_digest(b"blob")
    key = named_key("p", "condemned", "one")
    objects = MemoryObjectStore()
    document = CondemnedDocument("one", 1800, frozenset([digest]))
    await objects.write_bytes(key, document.to_bytes())
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        number = await publish(node, "a", b"blob")
        assert not await node.uploads.wait_published(number, 0.5)
        assert await objects.stat(blob_key("p", digest)) is None
        await objects.delete(key)
        assert await node.uploads.wait_published(number, 10)
        await asyncio.sleep(0.05)
        assert await objects.list_objects("projects/p/leases/", limit=9) == []


async def test_a_blob_of_the_shared_store_only_must_be_there(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    there, gone = sha256_digest(b"there"), sha256_digest(b"gone")
    await objects.write_bytes(blob_key("p", there), b"there")
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        store = (await node.project("p")).store
        for digest, published in ((there, True), (gone, False)):
            document = UploadItem.for_document(1, f"documents/{digest}", b"{}")
            number = await store.publish(digest, [[digest], [document]])
            assert number is not None
            assert await node.uploads.wait_published(number, 10) is published
            assert (await objects.stat(f"documents/{digest}") is not None) is published


async def test_uploads_that_wait_too_long_do_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with NodeStore(tmp_path, objects=MemoryObjectStore(), max_project_bytes=10_000) as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        store = (await node.project("p")).store
        base = bytes(4_000)
        first, second = [await publish(node, str(i), base, bytes([i]) * 2_000) for i in range(1, 3)]
        for i in range(3, 6):  # a burst may wait
            await publish(node, str(i), base, bytes([i]) * 2_000)
        assert await node.uploads.pending_count() == 15
        monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 0.0)
        await asyncio.sleep(0.01)
        number = await publish(node, "6", base, bytes([6]) * 2_000)
        # 4,000 bytes that all share, and 2,000 of each of the newest two, are below 90 %.
        assert await node.uploads.pending_count() == 6
        assert not await node.uploads.wait_published(first, 5)
        assert not await node.uploads.wait_published(second, 5)
        await store.trim()
        assert store.disk.used_bytes <= 9_000
        # One that is too large on its own goes all the same.
        large = await publish(node, "7", bytes([7]) * 12_000)
        assert await node.uploads.pending_count() == 2
        node.uploads._pause_until = 0.0
        node.uploads._wake.set()
        assert await node.uploads.wait_published(large, 10)
        assert not await node.uploads.wait_published(number, 5)


async def test_a_full_disk_of_the_index_stops_uploads_only_for_its_time(tmp_path: Path) -> None:
    objects = WriteOrder()
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        table = node.uploads._table
        working = table.done
        failed = 0

        async def full(*_: object) -> tuple[list[int], list[int]]:
            nonlocal failed
            failed += 1
            raise sqlite3.OperationalError("database or disk is full")

        table.done = full  # type: ignore[method-assign]
        number = await publish(node, "a")
        assert not await node.uploads.wait_published(number, 1.0)
        assert 1 <= failed <= 4
        table.done = working  # type: ignore[method-assign]
        assert await node.uploads.wait_published(number, 10)


async def test_the_queue_outlives_an_index_that_cannot_be_read_for_a_moment(
    tmp_path: Path,
) -> None:
    async with NodeStore(tmp_path, objects=MemoryObjectStore()) as node:
        assert node.uploads is not None
        table = node.uploads._table
        working = table.due

        async def broken(*_: object) -> tuple[list[QueuedUpload], float]:
            table.due = working  # type: ignore[method-assign]
            raise sqlite3.OperationalError("disk I/O error")

        table.due = broken  # type: ignore[method-assign]
        number = await publish(node, "a", b"blob")
        assert await node.uploads.wait_published(number, 10)


async def test_blobs_that_a_reboot_made_suspect_are_hashed_off_the_event_loop(
    make_node: Callable[..., NodeStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_node() as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        waiting = await publish(node, "a", b"blob")
        await publish(node, "b", b"other")
    (tmp_path / "one" / "projects" / "p" / "boot").write_text("another-boot")
    threads: list[str] = []
    working = hashlib.file_digest

    def noted(*arguments: object) -> object:
        threads.append(threading.current_thread().name)
        return working(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", noted)
    async with make_node() as node:
        assert node.uploads is not None
        await publish(node, "c", b"other")
        assert await node.uploads.wait_published(waiting, 10)
    assert len(threads) >= 2
    assert all(name.startswith("blob-io") for name in threads)


async def test_an_index_that_cannot_be_written_holds_the_queue_up_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_KEEP_LEASES_SECONDS", 0.02)
    monkeypatch.setattr(uploads, "_FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(uploads, "_LONGEST_PAUSE_SECONDS", 0.4)
    objects = WriteOrder()
    async with NodeStore(tmp_path, objects=objects) as node:
        assert node.uploads is not None
        node.uploads._pause_until = float("inf")
        number = await publish(node, "a", b"one")
        # As when the disk is full: SQLite reads and does not write.
        await node.database.run(lambda db: db.execute("PRAGMA query_only = ON"))
        node.uploads._pause_until = 0.0
        node.uploads._wake.set()
        with capture_logs() as logs:
            await asyncio.sleep(1.0)
        paused = [entry["cause"] for entry in logs if entry["event"] == "cache.upload.paused"]
        assert 1 <= len(paused) <= 8
        assert "readonly" in paused[0]
        await node.database.run(lambda db: db.execute("PRAGMA query_only = OFF"))
        assert await node.uploads.wait_published(number, 10)
        assert {task.get_name() for task in node.uploads._tasks._tasks} >= {
            "upload-queue", "upload-leases",
        }  # fmt: skip
