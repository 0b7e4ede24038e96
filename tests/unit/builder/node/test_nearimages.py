"""Images of other builds that a build reads from the node's own store."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.nearimages import HeldImages, NearImages
from offload_cache.nodestore import NodeStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_cache.tiered import ProjectStore

LAYER = bytes(range(256)) * 20_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ProjectStore]:
    async with NodeStore(tmp_path) as node:
        yield (await node.project("p")).store


async def make_image(store: ProjectStore) -> tuple[str, str]:
    layer = await store.put_blob(LAYER)
    config = await store.put_blob(b"{}")
    manifest = {
        "config": {"digest": config, "size": 2},
        "layers": [{"digest": layer, "size": len(LAYER)}],
    }
    return await store.put_blob(json.dumps(manifest).encode()), layer


async def read(near: NearImages, digest: str, offset: int, size: int) -> bytes:
    async with aclosing(near.read("base", digest, offset, size)) as pieces:
        return b"".join([piece async for piece in pieces])


async def test_image_of_the_same_member_is_read_in_ranges(store):
    image, layer = await make_image(store)
    held = HeldImages()
    held.add("ann", image)
    near = NearImages(held, "ann", store, {"base": image})
    assert await near.size("base", layer) == len(LAYER)
    assert await read(near, layer, 7, 3_000_000) == LAYER[7:3_000_007]
    other = await store.put_blob(b"not of this image")
    assert await near.size("base", other) is None
    assert await near.size("elsewhere", layer) is None


async def test_image_of_another_member_or_of_nobody_is_not_there(store):
    image, layer = await make_image(store)
    held = HeldImages()
    held.add("ann", image)
    assert await NearImages(held, "bob", store, {"base": image}).size("base", layer) is None
    held.remove("ann", image)
    assert await NearImages(held, "ann", store, {"base": image}).size("base", layer) is None


async def test_image_stays_readable_when_its_build_leaves(store):
    image, layer = await make_image(store)
    held = HeldImages()
    held.add("ann", image)
    near = NearImages(held, "ann", store, {"base": image})
    assert await near.size("base", image) is not None
    held.remove("ann", image)
    assert await read(near, layer, 0, 5) == LAYER[:5]


async def test_image_is_held_until_its_last_build_leaves():
    held = HeldImages()
    held.add("ann", "sha256:1")
    held.add("ann", "sha256:1")
    held.remove("ann", "sha256:1")
    assert held.has("ann", "sha256:1")
    held.remove("ann", "sha256:1")
    assert not held.has("ann", "sha256:1")
