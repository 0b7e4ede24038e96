"""Case `offer-100k`: how long the node takes to say what a build imports, in a store that is full.

The project has 100,000 blobs in the bucket and 50 builds' records, 1,000 in all, in two scopes. A
node that starts with nothing reads them; then offers are asked for one after the other, while the
node looks for news in the background as it does between builds. In this process: a command would
hide 20 ms behind its own start.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from benchmarks.model import Case
from offload_cache.contributions import Writer
from offload_cache.keys import blob_key
from offload_cache.nodestore import NodeStore
from offload_cache.s3config import S3Config
from offload_cache.s3store import S3Store
from offload_core.digest import sha256_digest
from tests.fixtures.cachecontent import cache_manifest, step_config
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

BLOBS = 100_000
BUILDS = 50
STEPS = 20
OFFERS = 1_000
PAUSE_SECONDS = 0.01
SCOPES = ("p/feature", "p/main")
WRITERS = 8

CASES = (
    Case("offer-100k", f"offer of a manifest, p99 of {OFFERS}", "", unit="ms", limit=20.0),
    Case("offer-100k-first", "the first offer of an empty node", "", unit="ms"),
)


def offer(session: Session) -> None:
    """Measure the cases."""
    work = session.work / "offer"
    work.mkdir()
    with MinioServer(work / "minio") as minio:
        first, later = asyncio.run(_measure(session, work, minio))
    session.report("offer-100k", [sorted(later)[len(later) * 99 // 100]])
    session.report("offer-100k-first", [first])


def _store(minio: MinioServer) -> S3Store:
    return S3Store(
        S3Config(minio.endpoint_url, "offload", minio.access_key, minio.secret_key),
        writers=WRITERS,
    )


async def _measure(session: Session, work: Path, minio: MinioServer) -> tuple[float, list[float]]:
    session.note(f"filling the bucket with {BLOBS} blobs")
    await _fill(minio)
    session.note(f"publishing the records of {BUILDS} builds")
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(NodeStore(work / "one", objects=_store(minio)))
        await _publish(node)
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(NodeStore(work / "two", objects=_store(minio)))
        offers = (await node.project("p")).offers
        took = []
        for _ in range(OFFERS + 1):
            began = time.perf_counter()
            found = await offers.offer(SCOPES, "build 0")
            took.append((time.perf_counter() - began) * 1000)
            if found is None or found.withheld:
                raise AssertionError("the store has it all")
            await asyncio.sleep(PAUSE_SECONDS)
        session.note(f"{found.records} records, {found.listed} layers in the manifest")
    return took[0], took[1:]


async def _fill(minio: MinioServer) -> None:
    objects = _store(minio)
    numbers = iter(range(BLOBS))

    async def some() -> None:
        for number in numbers:
            data = b"blob %d" % number
            await objects.write_bytes(blob_key("p", sha256_digest(data)), data)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(some())
    finally:
        await objects.close()


async def _publish(node: NodeStore) -> None:
    cache = await node.project("p")
    numbers = []
    for build in range(BUILDS):
        names = [f"build {build} step {step}" for step in range(STEPS)]
        layers = [f"layer of {name}".encode() for name in names]
        config = step_config(*names, layers=layers, base=f"base {build}")
        for data in (config, *layers):
            await cache.store.put_blob(data)
        published = await cache.scopes.publish(
            SCOPES[build % 2],
            f"build {build}",
            cache_manifest(config, layers),
            writer=Writer(f"b{build}", "somebody", "member"),
        )
        numbers.append(published.publication)
    uploads = node.uploads
    if uploads is None:
        raise AssertionError("there is a shared store")
    for number in numbers:
        if number is not None and not await uploads.wait_published(number, 120):
            raise AssertionError("a contribution was not uploaded")
