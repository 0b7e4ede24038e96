"""A disk that is really full: a small tmpfs. Needs root."""

from __future__ import annotations

import io
import os
import subprocess
from typing import TYPE_CHECKING

import aiohttp
import pytest

from offload_cache.contributions import Writer
from offload_cache.diskstore import DiskStore
from offload_cache.keys import blob_key
from offload_cache.nodestore import NodeStore
from offload_cache.registry import Grant, Registry, RegistryServer
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError, QuotaExceededError
from tests.fixtures.memorystore import MemoryObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = os.urandom(3 << 20)
DIGEST = sha256_digest(DATA)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_is_said_clearly_and_leaves_nothing(small_disk: Path) -> None:
    store = DiskStore(small_disk)
    store.open()
    with pytest.raises(QuotaExceededError, match=r"disk below .* is full"):
        store.put(DATA)
    assert not any((small_disk / "ingest").iterdir())
    store.put(b"small")


async def test_a_full_disk_refuses_an_upload_and_makes_a_fetch_a_miss(
    small_disk: Path, tmp_path: Path
) -> None:
    objects = MemoryObjectStore()
    await objects.write_bytes(blob_key("p", DIGEST), DATA)
    (tmp_path / "node" / "projects").mkdir(parents=True)
    (tmp_path / "node" / "projects" / "p").symlink_to(small_disk)
    registry = Registry()
    async with (
        NodeStore(tmp_path / "node", objects=objects) as node,
        RegistryServer(registry, node.statistics) as server,
        aiohttp.ClientSession() as http,
    ):
        project = await node.project("p")
        with pytest.raises(NotFoundError, match="full"):
            await project.store.open_blob(DIGEST)
        capability = registry.grant(Grant(project, (), "main", "k", Writer("b", "m", "member")))
        url = f"http://{server.address}/v2/{capability}/cache/blobs/uploads/"
        async with http.post(url, params={"digest": DIGEST}, data=io.BytesIO(DATA)) as response:
            assert response.status == 507
            assert "full" in (await response.json())["errors"][0]["message"]
        assert not any((small_disk / "ingest").iterdir())
