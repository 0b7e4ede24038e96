"""A build gives its client the blobs of its own image, and nothing else of the project."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.imagefiles import INDEX_TYPES, ImageFiles
from offload_cache.nodestore import NodeStore
from offload_core.digest import sha256_digest
from offload_core.errors import InternalError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_cache.tiered import ProjectStore

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ProjectStore]:
    async with NodeStore(tmp_path) as node:
        yield (await node.project("p")).store


async def put(store: ProjectStore, content: object) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return await store.put_blob(data)


async def image(store: ProjectStore, name: str, **extra: object) -> str:
    blobs = [{"digest": await put(store, f"{name}{n}".encode()), "size": n} for n in (1, 2, 3)]
    return await put(store, {"config": blobs[0], "layers": blobs[1:], **extra})


async def test_closure_of_an_index_is_admitted_and_nothing_else(store):
    one, two = await image(store, "one"), await image(store, "two", mediaType=MANIFEST)
    other = await put(store, b"another build's layer")
    index = await put(
        store, {"mediaType": INDEX_TYPES[0], "manifests": [{"digest": one}, {"digest": two}]}
    )
    files = ImageFiles(store)
    assert await files.admit(index) == INDEX_TYPES[0]
    assert files.media_type(one) == files.media_type(two) == MANIFEST
    for name in ("one", "two"):
        for number in (1, 2, 3):
            digest = sha256_digest(f"{name}{number}".encode())
            assert files.size(digest) == number
            assert files.media_type(digest) == ""
            assert (await files.path(digest)).read_bytes() == f"{name}{number}".encode()
    for digest in (other, "sha256:" + "0" * 64, "../../etc/passwd", ""):
        with pytest.raises(NotFoundError, match="not part of the image"):
            await files.path(digest)


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[]",
        {"layers": [{"digest": "d"}]},
        {"layers": [{"size": 1}]},
        {"layers": ["x"]},
        {"manifests": [{}]},
        {"manifests": 5},
    ],
)
async def test_damaged_manifest_is_an_error_with_its_digest(store, content):
    digest = await put(store, content)
    with pytest.raises(InternalError, match=digest):
        await ImageFiles(store).admit(digest)


async def test_index_that_names_what_is_not_here_is_a_miss(store):
    digest = await put(store, {"manifests": [{"digest": "sha256:" + "1" * 64}]})
    with pytest.raises(NotFoundError):
        await ImageFiles(store).admit(digest)
