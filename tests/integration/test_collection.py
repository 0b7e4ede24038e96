"""Collections of a real MinIO: by a process that is killed, and by nodes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_cache.collection.lock import LOCK_KEY
from offload_cache.collection.report import read_report
from offload_cache.keys import blob_key, kind_prefix
from offload_cache.nodestore import NodeStore
from offload_cache.s3store import S3Config, S3Store
from offload_cache.uploadtable import UploadItem
from offload_core.digest import sha256_digest
from tests.fixtures.collectingprocess import collect
from tests.fixtures.datedstore import PROJECT, DatedStore
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).resolve().parents[2]
GARBAGE = [b"garbage %d" % number for number in range(150)]
LIVE = [b"live %d" % number for number in range(5)]


@pytest.fixture
def minio(tmp_path: Path) -> Iterator[MinioServer]:
    with MinioServer(tmp_path / "minio") as server:
        yield server


@pytest.fixture
def config(minio: MinioServer) -> S3Config:
    return S3Config(minio.endpoint_url, "builds", minio.access_key, minio.secret_key)


@pytest.fixture
async def objects(config: S3Config) -> AsyncIterator[S3Store]:
    store = S3Store(config)
    yield store
    await store.close()


async def stored(objects: S3Store, kind: str) -> list[str]:
    prefix = kind_prefix(PROJECT, kind)
    found = await objects.list_objects(prefix, limit=10_000)
    return [info.key.removeprefix(prefix) for info in found]


async def fill(objects: S3Store) -> None:
    """Write what a contribution names, and what nothing names."""
    model = DatedStore()
    await model.contribute(*LIVE)
    for content in GARBAGE:
        await model.put_blob(content)
    for key in model.keys(""):
        name = f"projects/{PROJECT}/{key}"
        await objects.write_bytes(name, await model.read_bytes(name, max_bytes=100_000))


async def test_the_next_collection_completes_what_a_killed_one_left(
    config: S3Config, objects: S3Store, tmp_path: Path
) -> None:
    await fill(objects)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.collectingprocess", config.endpoint_url,
         config.bucket, config.access_key, config.secret_key],
        cwd=ROOT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            while not 10 < len(await stored(objects, "blobs")) < len(GARBAGE):
                assert process.poll() is None
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    left = await stored(objects, "blobs")
    assert len(left) > len(LIVE)
    assert len(await stored(objects, "condemned")) == 1
    assert await objects.stat(LOCK_KEY) is not None

    # A build relies upon one of the blobs that were being deleted: it waits, and nothing is lost.
    wanted = GARBAGE[-1]
    async with NodeStore(tmp_path / "node", objects=S3Store(config)) as node:
        assert node.uploads is not None
        store = (await node.project(PROJECT)).store
        digest = await store.put_blob(wanted)
        document = UploadItem.for_document(1, f"projects/{PROJECT}/images/{'0' * 64}", b"damaged")
        number = await store.publish("n", [[digest], [document]])
        assert number is not None
        assert not await node.uploads.wait_published(number, 1)
        # Two days later the lease of that publication is long over, and so is the list.
        report = await collect(config, days=4)
        assert report is not None
        assert report.complete
        assert report.projects[PROJECT].live_bytes == sum(map(len, LIVE))
        assert len(await stored(objects, "blobs")) == len(LIVE)
        assert await stored(objects, "condemned") == []
        assert await objects.stat(LOCK_KEY) is None
        assert await node.uploads.wait_published(number, 30)
        assert await objects.stat(blob_key(PROJECT, digest)) is not None
    for content in LIVE:
        key = blob_key(PROJECT, sha256_digest(content))
        assert await objects.read_bytes(key, max_bytes=100) == content


async def test_one_node_of_a_pool_collects_and_tells_the_others(
    minio: MinioServer, objects: S3Store
) -> None:
    await fill(objects)
    options = {
        "s3_endpoint": minio.endpoint_url,
        "s3_bucket": "builds",
        "s3_access_key": minio.access_key,
        "s3_secret_key": minio.secret_key,
        "cache_collect_every": 1.0,
    }
    async with NodePool() as pool:
        for name in ("one", "two"):
            await pool.start_node(name, **options)
        async with asyncio.timeout(30):
            while (report := await read_report(objects)) is None:
                await asyncio.sleep(0.1)
    assert report.by in {"one", "two"}
    assert report.projects[PROJECT].live_bytes == sum(map(len, LIVE))
    assert report.projects[PROJECT].garbage_bytes == sum(map(len, GARBAGE))
    assert len(await stored(objects, "blobs")) == len(LIVE) + len(GARBAGE)
