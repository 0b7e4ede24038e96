"""The store of context files: verified, leased, bounded."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.contextstore import ANY_SIZE, ContextStore
from offload_core.errors import ContextChangedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ContextStore]:
    async with ContextStore(tmp_path / "context", keep_bytes=3000) as opened:
        yield opened


async def put(store: ContextStore, *contents: bytes) -> None:
    await store.run(store.store_sync, [(sha(data), data) for data in contents])


async def missing(store: ContextStore, *contents: bytes) -> list[bytes]:
    return await store.run(store.missing_sync, [sha(data) for data in contents])


def content_of(store: ContextStore, digest: bytes) -> bytes:
    file = store.open_sync(digest)
    try:
        return os.read(file, 1 << 20)
    finally:
        os.close(file)


async def test_what_was_stored_is_there(store):
    await put(store, b"one", b"two")
    assert await missing(store, b"one", b"three", b"two") == [sha(b"three")]
    assert content_of(store, sha(b"one")) == b"one"
    with pytest.raises(NotFoundError):
        store.open_sync(sha(b"three"))


async def test_wrong_bytes_are_never_stored(store, tmp_path):
    with pytest.raises(ContextChangedError):
        await store.run(store.store_sync, [(sha(b"good"), b"evil")])
    assert await missing(store, b"good") == [sha(b"good")]
    assert list((tmp_path / "context").iterdir()) == []


async def test_blob_of_another_size_counts_as_missing_and_is_replaced(store):
    await put(store, b"whole")
    digest = sha(b"whole")
    assert await store.run(store.missing_sync, [digest, digest], [5, ANY_SIZE]) == []
    os.truncate(store.path(digest), 3)
    assert await store.run(store.missing_sync, [digest, digest], [5, ANY_SIZE]) == [digest]
    await put(store, b"whole")
    assert content_of(store, digest) == b"whole"
    os.truncate(store.path(digest), 0)
    assert await missing(store, b"whole") == [digest]


async def test_blob_that_is_there_is_not_written_again(store):
    await put(store, b"same")
    before = os.stat(store.path(sha(b"same")))
    await put(store, b"same")
    assert os.stat(store.path(sha(b"same"))) == before


def read(store: ContextStore, data: bytes, size: int = ANY_SIZE, *, verify: bool) -> bytes | None:
    return store.read_sync(sha(data), size, verify=verify)


async def test_reading_verifies_what_it_is_told_to(store):
    await put(store, b"data", b"other")
    assert read(store, b"data", verify=True) == read(store, b"data", 4, verify=False) == b"data"
    assert read(store, b"nothing", verify=True) is None
    with open(store.path(sha(b"data")), "r+b") as file:
        file.write(b"dat?")
    assert read(store, b"data", 4, verify=False) == b"dat?"
    assert read(store, b"data", 4, verify=True) is None
    assert await missing(store, b"data") == [sha(b"data")]
    # A wrong size is looked into although nothing is to be verified.
    os.truncate(store.path(sha(b"other")), 4)
    assert read(store, b"other", 5, verify=False) is None
    assert await missing(store, b"other") == [sha(b"other")]


async def test_whole_blob_survives_a_reader_that_expects_another_size(store):
    await put(store, b"data")
    with pytest.raises(UsageError, match="size"):
        read(store, b"data", 9, verify=False)
    assert await missing(store, b"data") == []


async def test_trim_deletes_the_longest_unused_and_spares_leases(store):
    contents = [bytes([number]) * 1000 for number in range(6)]
    await put(store, *contents)
    for age, data in enumerate(contents):
        os.utime(store.path(sha(data)), times=(0, time.time() - 100_000 * (6 - age)))
    store.lease([sha(contents[0]), sha(contents[0])])
    store.release([sha(contents[0])])
    await missing(store, contents[1])  # a use
    assert await store.trim() == 3000
    gone = await missing(store, *contents)
    assert gone == [sha(data) for data in contents[2:5]]
    store.release([sha(contents[0])])
    assert store._leased == {}


async def test_bound_is_enforced_when_a_tenth_of_it_was_added(store):
    await put(store, b"x" * 250)
    assert not store.trim_due
    await put(store, b"y" * 100)
    assert store.trim_due
    await store.trim()
    assert not store.trim_due


async def test_half_files_of_a_killed_node_are_removed(tmp_path):
    root = tmp_path / "context"
    (root / "ab").mkdir(parents=True)
    (root / "new-12").write_bytes(b"half")
    (root / "ab" / "stranger").write_bytes(b"?")
    async with ContextStore(root, keep_bytes=1) as store:
        assert not (root / "new-12").exists()
        assert await store.trim() == 0
