from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from offload_cache.diskstore import DiskStore
from offload_core.digest import sha256_digest
from offload_core.errors import DigestMismatchError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path) -> DiskStore:
    store = DiskStore(tmp_path / "disk")
    store.open()
    return store


def files(store: DiskStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file() and path.name != "boot"]


def age(store: DiskStore, digest: str, seconds: float) -> None:
    path = store.blob_path(digest)
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def test_committed_blob_is_found_under_its_digest(disk: DiskStore) -> None:
    ingest = disk.ingest()
    ingest.write(b"hello ")
    ingest.write(b"world")
    blob = ingest.commit(sha256_digest(b"hello world"), 11)
    path = disk.find(blob.digest)
    assert path is not None
    assert path.relative_to(disk.root).parts[:2] == ("blobs", "sha256")
    assert path.read_bytes() == b"hello world"
    assert disk.used_bytes == 11
    assert files(disk) == [path]


@pytest.mark.parametrize(
    ("digest", "size"), [(sha256_digest(b"other"), None), (None, 4), (sha256_digest(b"data!"), 4)]
)
def test_wrong_digest_or_size_keeps_nothing(
    disk: DiskStore, digest: str | None, size: int | None
) -> None:
    ingest = disk.ingest()
    ingest.write(b"data!")
    with pytest.raises(DigestMismatchError):
        ingest.commit(digest, size)
    assert files(disk) == []
    assert disk.used_bytes == 0


def test_pieces_written_out_of_order_are_hashed_as_a_whole(disk: DiskStore) -> None:
    ingest = disk.ingest()
    ingest.write_at(5, b"world")
    ingest.write_at(0, b"hello")
    assert ingest.commit(sha256_digest(b"helloworld"), 10).size_bytes == 10


def test_write_after_abort_is_refused_and_leaves_no_file(disk: DiskStore) -> None:
    ingest = disk.ingest()
    ingest.write(b"x")
    ingest.abort()
    with pytest.raises(NotFoundError):
        ingest.write(b"y")
    with pytest.raises(NotFoundError):
        ingest.commit()
    assert files(disk) == []


def test_concurrent_writers_of_one_blob_leave_one_whole_file(disk: DiskStore) -> None:
    data = os.urandom(200_000)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            barrier.wait(10)
            ingest = disk.ingest()
            for start in range(0, len(data), 10_000):
                ingest.write(data[start : start + 10_000])
            ingest.commit(sha256_digest(data), len(data))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert disk.read(sha256_digest(data)) == data
    assert disk.used_bytes == len(data)
    assert len(files(disk)) == 1


def test_start_removes_leftover_ingests_and_counts_blobs(disk: DiskStore) -> None:
    digest = disk.put(b"kept")
    (disk.root / "ingest" / "0123").write_bytes(b"half")  # what a killed process leaves
    again = DiskStore(disk.root)
    again.open()
    assert files(again) == [again.blob_path(digest)]
    assert again.used_bytes == 4


@pytest.mark.parametrize("content", [b"goo", b"evil", b"good"])
def test_after_a_reboot_recent_blobs_are_hashed_before_use(disk: DiskStore, content: bytes) -> None:
    digest = disk.put(b"good")
    disk.blob_path(digest).write_bytes(content)
    (disk.root / "boot").write_text("another-boot")
    again = DiskStore(disk.root)
    again.open()
    assert again.is_suspect(digest)
    assert not again.has(digest)
    assert (again.find(digest) is not None) == (content == b"good")
    assert again.used_bytes == (4 if content == b"good" else 0)
    assert not again.is_suspect(digest)


def test_after_a_reboot_blobs_stay_suspect_until_they_were_hashed(disk: DiskStore) -> None:
    whole, damaged = disk.put(b"good"), disk.put(b"better")
    disk.blob_path(damaged).write_bytes(bytes(6))
    (disk.root / "boot").write_text("another-boot")
    for _ in range(2):  # the node starts twice after it
        again = DiskStore(disk.root)
        again.open()
        assert again.is_suspect(whole)
        assert again.is_suspect(damaged)
    assert again.find(whole) is not None
    later = DiskStore(disk.root)
    later.open()
    assert not later.is_suspect(whole)
    assert later.find(damaged) is None
    assert files(later) == [later.blob_path(whole)]


def test_damaged_blob_after_a_reboot_is_replaced_by_a_new_ingest(disk: DiskStore) -> None:
    digest = disk.put(b"good")
    disk.blob_path(digest).write_bytes(b"b")
    (disk.root / "boot").write_text("another-boot")
    again = DiskStore(disk.root)
    again.open()
    ingest = again.ingest()
    ingest.write(b"good")
    ingest.commit(digest, 4)
    assert again.read(digest) == b"good"
    assert again.used_bytes == 4


def test_trim_removes_the_least_recently_used_first(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=1000)
    store.open()
    digests = [store.put(bytes([i]) * 300) for i in range(4)]
    for position, digest in enumerate(digests):
        age(store, digest, seconds=1000 - position * 100)
    assert store.find(digests[0]) is not None  # used again
    result = store.trim()
    assert result.removed_blobs == 1
    assert [store.has(digest) for digest in digests] == [True, False, True, True]
    assert store.used_bytes == 900


def test_trim_spares_leased_and_kept_blobs(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=100)
    store.open()
    leased, kept, free = (store.put(bytes([i]) * 300) for i in range(3))
    with store.lease([leased]), store.lease([leased]):
        store.trim(keep={kept})
        assert [store.has(d) for d in (leased, kept, free)] == [True, True, False]
    store.trim(keep={kept})
    assert not store.has(leased)


def test_reading_a_trimmed_blob_says_not_found(disk: DiskStore) -> None:
    digest = disk.put(b"x")
    assert disk.delete(digest) == 1
    assert disk.delete(digest) == 0
    with pytest.raises(NotFoundError):
        disk.read(digest)
    assert disk.size(digest) is None


@pytest.mark.parametrize(
    "name", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "", "../x"]
)
def test_anything_but_a_digest_never_becomes_a_path(disk: DiskStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        disk.find(name)
