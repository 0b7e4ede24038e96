from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from offload_cache.collection.collector import Collector
from offload_cache.collection.plan import Limits
from offload_cache.keys import pack_key, pack_prefix
from offload_cache.packs.catalog import PackCatalog
from offload_cache.packs.merge import MANY, PackMerger
from offload_cache.packs.pending import PendingBlobs
from offload_cache.packs.reader import PackReader
from offload_cache.packs.refresh import CatalogRefresh
from offload_cache.packs.writer import PackWriter
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.packs import Blobs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Node:
    """The parts of one node's sharing, without anything in the background."""

    def __init__(self, root: Path, name: str, threads: ThreadPoolExecutor) -> None:
        folder = root / name
        folder.mkdir()
        self.blobs = Blobs()
        self.objects = DirectoryObjectStore(root / "shared")
        self.catalog = PackCatalog(folder / "catalog.db")
        self.catalog.open()
        self.pending = PendingBlobs(folder / "pending")
        self.refresh = CatalogRefresh(self.objects, "web", self.catalog, threads)
        self.writer = PackWriter(
            self.objects, "web", self.catalog, folder,
            read=self.blobs.read, thread=threads, threads=threads, pace=self.pace,
        )  # fmt: skip
        self.merger = PackMerger(
            self.objects, "web", self.catalog, self.writer, thread=threads, threads=threads
        )
        self.reader = PackReader(
            self.objects, "web", self.catalog, threads, on_read=lambda pack: None
        )

    @staticmethod
    async def pace(seconds: float) -> None:
        assert seconds >= 0

    async def pack_each(self, digests: list[bytes]) -> None:
        """Make a pack of each blob."""
        for digest in digests:
            self.pending.add([digest])
            await self.writer.write_pack(self.pending)

    async def fetch(self, digests: list[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        async for group in self.reader.read(self.catalog.locate(digests)):
            found |= dict(group)
        return found

    async def count(self, kind: str) -> int:
        return len(await self.objects.list_objects(pack_prefix("web", kind), limit=1000))

    async def close(self) -> None:
        await self.refresh.close()
        self.catalog.close()
        await self.objects.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


async def test_many_small_packs_become_one(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    node, stale = (Node(tmp_path, name, threads) for name in ("one", "stale"))
    digests = node.blobs.make(MANY * 2, 2000)
    await node.pack_each(digests)
    assert await stale.refresh.refresh(10)
    assert await node.merger.merge() == MANY * 2
    assert await node.count("index") == 1
    assert await node.fetch(digests) == node.blobs.content

    # Old packs stay for those who know them, for a day.
    limits = Limits(0, 1e6, 1 << 30, 1e6)
    await Collector(node.objects, "one", lambda _: limits).run()
    assert await stale.fetch(digests) == node.blobs.content

    fresh = Node(tmp_path, "fresh", threads)
    assert await fresh.refresh.refresh(10)
    assert len({place.pack for place in fresh.catalog.locate(digests)}) == 1
    assert await fresh.fetch(digests) == node.blobs.content
    assert await node.merger.merge() == 0
    for opened in (node, stale, fresh):
        await opened.close()


async def test_few_packs_are_left_alone(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    node = Node(tmp_path, "one", threads)
    await node.pack_each(node.blobs.make(MANY - 1, 100))
    assert await node.merger.merge() == 0
    await node.close()


async def test_damaged_packs_are_not_merged(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    node = Node(tmp_path, "one", threads)
    digests = node.blobs.make(MANY * 2, 2000)
    await node.pack_each(digests)
    names = sorted(node.catalog.names())
    await node.objects.write_bytes(pack_key("web", "packs", names[0]), b"noise")
    await node.objects.delete(pack_key("web", "packs", names[1]))
    await node.objects.write_bytes(pack_key("web", "index", names[2]), b"noise")
    assert await node.merger.merge() == MANY * 2 - 3
    good = await node.fetch(digests)
    assert good == {digest: node.blobs.content[digest] for digest in digests[3:]}
    await node.close()
