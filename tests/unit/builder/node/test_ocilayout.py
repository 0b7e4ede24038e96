"""Blobs of a client's OCI layout, read in ranges."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from offload_builder.node.ocilayout import KEPT_READERS, ClientLayouts
from offload_core.errors import ContextError, NotFoundError

DIGESTS = [f"sha256:{number:064}" for number in range(20)]
CONTENT = bytes(range(256)) * 20_000


class Tree:
    """A layout in memory that counts how often each blob is read from its start."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.paths = ["blobs", "blobs/sha256", *(f"blobs/{d.replace(':', '/')}" for d in blobs)]
        self.contents = [b"", b"", *blobs.values()]
        self.begun: list[int] = []
        self.ended = 0
        self.closed = False

    async def complete(self) -> None:
        await asyncio.sleep(0)

    def index_of(self, path: str) -> int | None:
        return self.paths.index(path) if path in self.paths else None

    def content_size(self, index: int) -> int:
        return len(self.contents[index]) if index > 1 else -1

    async def requested(self, indexes: list[int]) -> None:
        self.begun += indexes

    async def read(self, index: int):
        try:
            data = self.contents[index]
            for start in range(0, len(data), 300_000):
                await asyncio.sleep(0)
                yield data[start : start + 300_000]
        finally:
            self.ended += 1

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
async def tree():
    return Tree(dict.fromkeys(DIGESTS, CONTENT))


@pytest.fixture
async def layouts(tree):
    async def open_tree(name: str) -> Tree:
        assert name == "oci:base"
        return tree

    found = ClientLayouts({"store": "oci:base"}, open_tree)
    yield found
    await found.close()
    assert tree.closed
    assert tree.ended == len(tree.begun)


async def read(layouts: ClientLayouts, digest: str, offset: int, size: int) -> bytes:
    async with aclosing(layouts.read("store", digest, offset, size)) as pieces:
        return b"".join([bytes(piece) async for piece in pieces])


async def test_ranges_in_a_row_read_the_blob_once(layouts, tree):
    assert await layouts.size("store", DIGESTS[0]) == len(CONTENT)
    data = b""
    for size in (1, 32_768, 1_000_000, 2_500_000, 10_000_000):
        data += await read(layouts, DIGESTS[0], len(data), size)
    assert data == CONTENT
    assert len(tree.begun) == 1


async def test_any_range_can_be_read(layouts, tree):
    for offset, size in ((4_000_000, 10), (0, 10), (10, 5), (1_000_000, 3_000_000)):
        found = await read(layouts, DIGESTS[0], offset, size)
        assert found == CONTENT[offset : offset + size]
    assert len(tree.begun) == 3


async def test_call_that_ends_with_its_last_piece_keeps_the_place(layouts, tree):
    pieces = layouts.read("store", DIGESTS[0], 0, 100)
    assert len(await anext(pieces)) == 100
    await pieces.aclose()
    assert await read(layouts, DIGESTS[0], 100, 100) == CONTENT[100:200]
    assert len(tree.begun) == 1


async def test_call_that_ends_early_gives_its_place_up(layouts, tree):
    pieces = layouts.read("store", DIGESTS[0], 0, 2_000_000)
    await anext(pieces)
    await pieces.aclose()
    assert tree.ended == 1


async def test_few_places_are_kept(layouts, tree):
    for digest in DIGESTS:
        await read(layouts, digest, 0, 10)
    assert tree.ended == len(DIGESTS) - KEPT_READERS


async def test_blobs_are_read_side_by_side(layouts, tree):
    found = await asyncio.gather(*(read(layouts, digest, 0, 10**9) for digest in DIGESTS[:6]))
    assert all(data == CONTENT for data in found)


async def test_what_is_not_in_the_layout(layouts):
    for store, digest in (("store", "sha256:ff"), ("other", DIGESTS[0]), ("store", "../sha256")):
        assert await layouts.size(store, digest) is None
        with pytest.raises(NotFoundError):
            await anext(layouts.read(store, digest, 0, 1))


async def test_layout_that_cannot_be_listed_is_an_error():
    class Broken(Tree):
        async def complete(self) -> None:
            raise ContextError("no")

    broken = Broken({})

    async def open_tree(name: str) -> Tree:
        return broken

    layouts = ClientLayouts({"store": "oci:x"}, open_tree)
    with pytest.raises(ContextError):
        await layouts.size("store", DIGESTS[0])
    assert broken.closed


class Near:
    """Blobs that the node has anyway."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = blobs
        self.ended = 0

    async def size(self, layout: str, digest: str) -> int | None:
        assert layout == "store"
        return len(self.blobs[digest]) if digest in self.blobs else None

    async def read(self, layout: str, digest: str, offset: int, size: int):
        try:
            yield self.blobs[digest][offset : offset + size]
        finally:
            self.ended += 1


async def test_what_is_near_is_not_asked_of_the_client(tree):
    async def open_tree(name: str) -> Tree:
        return tree

    near = Near({DIGESTS[0]: b"here"})
    layouts = ClientLayouts({"store": "oci:base"}, open_tree, near)
    assert await layouts.size("store", DIGESTS[0]) == 4
    assert await read(layouts, DIGESTS[0], 1, 2) == b"er"
    assert tree.begun == []
    assert near.ended == 1
    assert await layouts.size("store", DIGESTS[1]) == len(CONTENT)
    assert await read(layouts, DIGESTS[1], 0, 10) == CONTENT[:10]
    assert len(tree.begun) == 1
    await layouts.close()
