"""The store of context files: verified, leased, bounded."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.contextstore import ContextStore
from offload_core.errors import ContextChangedError, NotFoundError

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
    with pytest.raises(ContextChangedError), store.begin_sync(sha(b"good")) as blob:
        blob.write(b"go")
        blob.write(b"0d")
        blob.commit()
    assert await missing(store, b"good") == [sha(b"good")]
    assert list((tmp_path / "context").iterdir()) == []


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
