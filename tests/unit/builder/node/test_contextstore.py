"""The store of context files: verified, leased, bounded."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_builder.node import smallblobs
from offload_builder.node.contextstore import ANY_SIZE, ContextStore
from offload_builder.node.smallblobs import SMALL_BYTES
from offload_core.errors import ContextChangedError, QuotaExceededError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ContextStore]:
    async with ContextStore(tmp_path / "context", keep_bytes=3000) as opened:
        yield opened


async def put(store: ContextStore, *contents: bytes) -> None:
    await store.run(store.store_sync, [(sha(data), data) for data in contents])


def damage(store: ContextStore, data: bytes, wrong: bytes) -> None:
    """Make the disk return other bytes for a blob, the last of its segment."""
    if len(data) > SMALL_BYTES:
        Path(store.path(sha(data))).write_bytes(wrong)
        return
    segment = max(store._root.glob("small/*.seg"), key=lambda path: int(path.stem))
    whole = segment.read_bytes()
    assert whole.endswith(data)
    segment.write_bytes(whole.removesuffix(data) + wrong)


async def missing(store: ContextStore, *contents: bytes) -> list[bytes]:
    return await store.run(store.missing_sync, [sha(data) for data in contents])


LARGE = SMALL_BYTES + 1
BIG = os.urandom(SMALL_BYTES + 50_000)


async def test_what_was_stored_is_there(store):
    await put(store, b"one", BIG, b"two")
    assert await missing(store, b"one", b"three", BIG, b"two") == [sha(b"three")]
    assert read(store, b"one", verify=True) == b"one"
    assert read(store, BIG, verify=True) == BIG
    assert read(store, b"three", verify=True) is None
    assert store.read_part_sync(sha(b"two"), 1, 9) == b"wo"
    assert store.read_part_sync(sha(BIG), 1, 9) == BIG[1:10]


async def test_what_was_stored_is_there_after_a_restart(tmp_path):
    for _ in range(2):
        async with ContextStore(tmp_path / "context", keep_bytes=1 << 30) as store:
            await put(store, b"one", BIG)
    async with ContextStore(tmp_path / "context", keep_bytes=1 << 30) as store:
        assert await missing(store, b"one", BIG) == []
        assert read(store, b"one", verify=True) == b"one"


async def test_wrong_bytes_are_never_stored(store):
    with pytest.raises(ContextChangedError):
        await store.run(store.store_sync, [(sha(b"good"), b"evil")])
    assert await missing(store, b"good") == [sha(b"good")]


async def test_blob_of_another_size_counts_as_missing_and_is_replaced(store):
    await put(store, BIG, b"small")
    digest, size = sha(BIG), len(BIG)
    assert await store.run(store.missing_sync, [digest, sha(b"small")], [size, 5]) == []
    assert await store.run(store.missing_sync, [sha(b"small")], [4]) == [sha(b"small")]
    os.truncate(store.path(digest), 100_000)
    assert await store.run(store.missing_sync, [digest], [size]) == [digest]
    await put(store, BIG)
    assert read(store, BIG, size, verify=False) == BIG
    os.truncate(store.path(digest), 0)
    assert await missing(store, BIG) == [digest]


async def test_blob_that_is_there_is_not_written_again(store, tmp_path):
    await put(store, BIG, b"small")
    path = Path(store.path(sha(BIG)))
    before = path.stat()
    [segment] = (tmp_path / "context" / "small").glob("*.seg")
    await put(store, BIG, b"small")
    assert path.stat() == before
    assert segment.stat().st_size == 5


def read(store: ContextStore, data: bytes, size: int = ANY_SIZE, *, verify: bool) -> bytes | None:
    return store.read_sync(sha(data), size, verify=verify)


@pytest.mark.parametrize("data", [b"data", BIG], ids=["small", "big"])
async def test_reading_verifies_what_it_is_told_to(store, data):
    await put(store, data)
    size = len(data)
    assert read(store, data, verify=True) == read(store, data, size, verify=False) == data
    wrong = b"?" + data[1:]
    damage(store, data, wrong)
    assert read(store, data, size, verify=False) == wrong
    assert read(store, data, size, verify=True) is None
    assert await missing(store, data) == [sha(data)]
    assert read(store, data, verify=True) is None
    await put(store, data)
    assert read(store, data, verify=True) == data
    # A wrong size is looked into although nothing is to be verified.
    damage(store, data, data[:2])
    assert read(store, data, size, verify=False) is None
    assert await missing(store, data) == [sha(data)]


async def test_whole_blob_survives_a_reader_that_expects_another_size(store):
    await put(store, b"data")
    with pytest.raises(UsageError, match="size"):
        read(store, b"data", 9, verify=False)
    assert await missing(store, b"data") == []


async def test_trim_deletes_the_longest_unused_and_spares_leases(tmp_path):
    async with ContextStore(tmp_path, keep_bytes=3 * LARGE) as store:
        contents = [bytes([number]) * LARGE for number in range(6)]
        await put(store, *contents)
        for age, data in enumerate(contents):
            os.utime(store.path(sha(data)), times=(0, time.time() - 100_000 * (6 - age)))
        store.lease([sha(contents[0]), sha(contents[0])])
        store.release([sha(contents[0])])
        await missing(store, contents[1])  # a use
        assert await store.trim() == 3 * LARGE
        gone = await missing(store, *contents)
        assert gone == [sha(data) for data in contents[2:5]]
        store.release([sha(contents[0])])
        assert store._leased == {}


async def test_trim_deletes_whole_segments_of_small_blobs_and_spares_leases(tmp_path, monkeypatch):
    monkeypatch.setattr(smallblobs, "SEGMENT_BYTES", 2000)
    async with ContextStore(tmp_path, keep_bytes=4000) as store:
        contents = [bytes([number]) * 1000 for number in range(10)]
        for data in contents:
            await put(store, data)
        numbers = sorted(store._small.segments(), key=lambda segment: segment.number)
        assert [segment.size_bytes for segment in numbers] == [2000] * 5
        for age, segment in enumerate(numbers):
            store._small._writing.execute(
                "UPDATE segments SET used_at = ? WHERE number = ?",
                (time.time() - 100_000 * (6 - age), segment.number),
            )
        store.lease([sha(contents[1])])
        await missing(store, contents[2])  # a use
        assert await store.trim() == 6000
        assert await missing(store, *contents) == [sha(data) for data in contents[4:]]
        # The segment that was open went, too; the store goes on in a new one.
        await put(store, contents[9])
        assert read(store, contents[9], verify=True) == contents[9]
        assert len(list(tmp_path.glob("small/*.seg"))) == 3
        store.release([sha(contents[1])])


async def test_bound_is_enforced_when_a_tenth_of_it_was_added(store):
    await put(store, b"x" * 250)
    assert not store.trim_due
    await put(store, b"y" * 100)
    assert store.trim_due
    await store.trim()
    assert not store.trim_due


async def test_what_a_killed_node_left_is_repaired(tmp_path):
    root = tmp_path / "context"
    (root / "ab").mkdir(parents=True)
    (root / "new-12").write_bytes(b"half")
    (root / "ab" / "stranger").write_bytes(b"?")
    async with ContextStore(root, keep_bytes=1 << 30) as store:
        assert not (root / "new-12").exists()
        await put(store, b"one")
    [segment] = (root / "small").glob("*.seg")
    (root / "small" / "77.seg").write_bytes(b"of no row")
    async with ContextStore(root, keep_bytes=1 << 30) as store:
        assert list((root / "small").glob("*.seg")) == [segment]
        assert await missing(store, b"one") == []
    segment.unlink()
    async with ContextStore(root, keep_bytes=1 << 30) as store:
        assert await missing(store, b"one") == [sha(b"one")]
        await put(store, b"one")
        assert await store.trim() == 0


async def test_damaged_index_is_given_up(tmp_path):
    async with ContextStore(tmp_path, keep_bytes=1 << 30) as store:
        await put(store, b"one")
    (tmp_path / "small" / "index.db").write_bytes(b"this is no database" * 500)
    async with ContextStore(tmp_path, keep_bytes=1 << 30) as store:
        assert await missing(store, b"one") == [sha(b"one")]
        await put(store, b"one")
        assert read(store, b"one", verify=True) == b"one"
    assert len(list(tmp_path.glob("small/*.seg"))) == 1


async def test_index_that_a_power_cut_has_damaged_is_given_up(tmp_path, monkeypatch):
    contents = [b"%d" % number * 20 for number in range(3000)]
    async with ContextStore(tmp_path, keep_bytes=1 << 30) as store:
        await put(store, *contents)
    index = tmp_path / "small" / "index.db"
    data = bytearray(index.read_bytes())
    data[8 * 4096 :] = bytes(len(data) - 8 * 4096)
    boot = tmp_path / "boot"
    boot.write_text("another\n")
    monkeypatch.setattr(smallblobs, "_BOOT_ID", boot)
    async with ContextStore(tmp_path, keep_bytes=1 << 30) as store:
        assert await missing(store, *contents) == []
    index.write_bytes(data)
    boot.write_text("and another\n")
    async with ContextStore(tmp_path, keep_bytes=1 << 30) as store:
        assert len(await missing(store, *contents)) == 3000
        await put(store, contents[0])


async def test_failed_write_leaves_nothing_that_is_trusted(store, monkeypatch):
    real = os.write
    written = []

    def short(file: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(file, data[:2]))
        return written[0]

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(QuotaExceededError):
        await put(store, b"first of all")
    monkeypatch.undo()
    assert await missing(store, b"first of all") == [sha(b"first of all")]
    assert list(store._root.glob("small/*.seg")) == []
    await put(store, b"first of all", b"second")
    # Else they would be given up to make room.
    store.lease([sha(b"first of all"), sha(b"second")])
    written.clear()
    monkeypatch.setattr(os, "write", short)
    with pytest.raises(QuotaExceededError):
        await put(store, b"third")
    monkeypatch.undo()
    await put(store, b"third")
    for data in (b"first of all", b"second", b"third"):
        assert read(store, data, verify=True) == data


async def test_full_disk_makes_room_of_what_no_build_needs(store, monkeypatch):
    old, needed = b"o" * LARGE, b"n" * LARGE
    await put(store, old)
    await put(store, needed)
    store.lease([sha(needed)])
    real = os.write

    def full_while_old_is_there(file: int, data: memoryview) -> int:
        if Path(store.path(sha(old))).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", full_while_old_is_there)
    await put(store, b"w" * LARGE)
    monkeypatch.undo()
    assert await missing(store, old, needed, b"w" * LARGE) == [sha(old)]
