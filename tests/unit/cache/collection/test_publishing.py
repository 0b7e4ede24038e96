from __future__ import annotations

from pathlib import Path

import pytest

from offload_cache.collection.documents import CondemnedDocument
from offload_cache.collection.publishing import (
    BlobFound,
    CondemnedError,
    Publishing,
    Sightings,
)
from offload_cache.collection.timing import LEASE_SECONDS, UPLOAD_TRUST_SECONDS
from offload_cache.keys import named_key
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError
from tests.fixtures.datedstore import PROJECT, DatedStore

CONTENT = b"layer"
DIGEST = sha256_digest(CONTENT)


class Node:
    def __init__(self, folder: Path) -> None:
        self.store = DatedStore()
        self.sightings = Sightings(self.store.clock)
        self.path = folder / "blob"
        self.path.write_bytes(CONTENT)

    def publishing(self, digest: str = DIGEST) -> Publishing:
        return Publishing(self.store, PROJECT, [digest], self.sightings, clock=self.store.clock)

    async def ensure(self, publishing: Publishing) -> BlobFound:
        return await publishing.ensure(DIGEST, None, lambda _: self.path)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_a_blob_is_uploaded_where_there_is_none_and_trusted_for_a_while(node: Node) -> None:
    publishing = node.publishing()
    assert not await publishing.protect()
    assert len(node.store.keys("leases/")) == 1
    assert await node.ensure(publishing) is BlobFound.WRITTEN
    assert await publishing.protect()
    await publishing.end()
    assert node.store.keys("leases/") == []
    node.store.seconds = UPLOAD_TRUST_SECONDS - 1
    later = node.publishing()
    await later.protect()
    assert await node.ensure(later) is BlobFound.KNOWN
    node.store.seconds += 2
    later = node.publishing()
    await later.protect()
    assert await node.ensure(later) is BlobFound.SEEN


async def test_what_was_seen_before_the_lease_is_looked_for_again(node: Node) -> None:
    await node.store.put_blob(CONTENT)
    first = node.publishing()
    await first.protect()
    assert await node.ensure(first) is BlobFound.SEEN
    assert await node.ensure(first) is BlobFound.KNOWN
    node.store.seconds = 1
    second = node.publishing()
    await second.protect()
    assert await node.ensure(second) is BlobFound.SEEN


async def test_a_blob_that_is_neither_here_nor_there_ends_the_publication(node: Node) -> None:
    publishing = node.publishing()
    await publishing.protect()
    with pytest.raises(NotFoundError):
        await publishing.ensure(DIGEST, None, lambda _: None)


async def test_a_publication_waits_while_a_collection_deletes_its_blobs(node: Node) -> None:
    key = named_key(PROJECT, "condemned", "one")
    document = CondemnedDocument("one", 1800, frozenset([DIGEST]))
    await node.store.write_bytes(key, document.to_bytes())
    publishing = node.publishing()
    with pytest.raises(CondemnedError):
        await publishing.protect()
    assert not publishing.holds
    assert not await node.publishing(sha256_digest(b"other")).protect()
    await node.store.delete(key)
    assert not await publishing.protect()
    assert publishing.holds


async def test_the_list_of_a_dead_collector_is_waited_for_until_its_time_is_over(
    node: Node,
) -> None:
    document = CondemnedDocument("dead", 1800, frozenset(), frozenset([DIGEST]))
    await node.store.write_bytes(named_key(PROJECT, "condemned", "d"), document.to_bytes())
    node.store.seconds = 1799
    with pytest.raises(CondemnedError):
        await node.publishing().protect()
    node.store.seconds = 1801
    assert not await node.publishing().protect()


async def test_a_lease_is_renewed_in_time_and_begins_anew_when_it_was_not(node: Node) -> None:
    publishing = node.publishing()
    await publishing.protect()
    for _ in range(10):
        node.store.seconds += LEASE_SECONDS / 2
        assert await publishing.protect()
    turn = publishing.turn
    node.store.seconds += LEASE_SECONDS
    assert not publishing.holds
    assert not await publishing.protect()
    assert publishing.turn == turn + 1
