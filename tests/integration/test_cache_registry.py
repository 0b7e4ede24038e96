"""Real buildkitd daemons that share nothing but a real MinIO, each with a node's registry."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import socket
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from offload_cache.contributions import Writer
from offload_cache.health import StoreHealth
from offload_cache.keys import blob_key
from offload_cache.nodestore import NodeStore
from offload_cache.registry import Grant, Registry, RegistryServer
from offload_cache.s3store import S3Config, S3Store
from offload_cache.statistics import CacheStatistics
from tests.fixtures.buildkitd import Buildkitd
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

DOCKERFILE = """\
FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox dd if=/dev/urandom of=/big bs=1M count=8"]
COPY source.txt /source.txt
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox date +%s%N > /built"]
"""
ZSTD = "compression=zstd,oci-mediatypes=true"
STEPS = 4
BUILDS = itertools.count(1)
EXECUTED = "records out"  # dd says so when it really runs


class Node:
    """A cache node with a buildkitd of its own."""

    def __init__(self, daemon: Buildkitd, store: NodeStore, context: Path) -> None:
        self.daemon = daemon
        self.store = store
        self.registry = Registry()
        self.server = RegistryServer(self.registry, store.statistics)
        self._context = context

    async def build(
        self, *, may_import: bool = True, export_cache: bool = True
    ) -> tuple[str, str, str]:
        """Build and push; return the log, the image's digest and the capability."""
        project = await self.store.project("shop")
        writer = Writer(f"b{next(BUILDS)}", "ada", "member")
        grant = Grant(project, ("main",), "main", "default", writer, may_import)
        capability = self.registry.grant(grant)
        cache = f"{self.server.address}/{capability}/cache"
        image = f"{self.server.address}/{capability}/image"
        metadata = self.daemon.root / "metadata.json"
        arguments = [
            "build", "--progress=plain", "--frontend=dockerfile.v0",
            "--local", f"context={self._context}", "--local", f"dockerfile={self._context}",
            "--import-cache", f"type=registry,ref={cache}:import",
            "--output", f"type=image,name={image}:latest,push=true,store=false,{ZSTD}",
            "--metadata-file", str(metadata),
        ]  # fmt: skip
        if export_cache:
            arguments += [
                "--export-cache",
                f"type=registry,ref={cache}:export,mode=max,image-manifest=true,{ZSTD}",
            ]  # fmt: skip
        done: subprocess.CompletedProcess[str] = await asyncio.to_thread(
            self.daemon.buildctl, *arguments
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.daemon.log_tail()}"
        digest = json.loads(metadata.read_text())["containerimage.digest"]
        return done.stderr, digest, capability

    async def publish(self, capability: str) -> None:
        """Wait until another node can read what a build exported."""
        assert self.store.uploads is not None
        for export in self.registry.exports(capability):
            # An export that adds nothing to what is known has nothing to wait for.
            if export.publication is not None:
                assert await self.store.uploads.wait_published(export.publication, 30)


def cached_steps(log: str) -> int:
    return log.count(" CACHED\n")


@pytest.fixture
def minio(tmp_path: Path) -> Iterator[MinioServer]:
    with MinioServer(tmp_path / "minio") as server:
        yield server


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    shutil.copy("/bin/busybox", folder / "busybox")
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "source.txt").write_text("one")
    return folder


class Bench:
    def __init__(self, minio: MinioServer, context: Path, root: Path) -> None:
        self.minio = minio
        self.context = context
        self.root = root

    def config(self, endpoint_url: str | None = None) -> S3Config:
        return S3Config(
            endpoint_url or self.minio.endpoint_url, "builds", self.minio.access_key,
            self.minio.secret_key, prefix="pool", connect_seconds=1, read_seconds=5,
        )  # fmt: skip

    @asynccontextmanager
    async def node(self, name: str, endpoint_url: str | None = None) -> AsyncIterator[Node]:
        statistics = CacheStatistics()
        config = self.config(endpoint_url)
        health = StoreHealth("s3", pause_seconds=1)
        objects = S3Store(config, health=health, statistics=statistics)
        store = NodeStore(self.root / name / "cache", objects=objects, statistics=statistics)
        with Buildkitd(self.root / name / "buildkit") as daemon:
            node = Node(daemon, store, self.context)
            async with store, node.server:
                yield node


@pytest.fixture
def bench(minio: MinioServer, context: Path, tmp_path: Path) -> Bench:
    return Bench(minio, context, tmp_path)


async def layers_of(node: Node, digest: str) -> list[str]:
    store = (await node.store.project("shop")).store
    manifest = json.loads(await store.read_blob(digest, max_bytes=1 << 20))
    return [layer["digest"] for layer in manifest["layers"]]


async def test_an_empty_node_builds_from_the_shared_cache_without_moving_a_layer(
    bench: Bench,
) -> None:
    async with bench.node("one") as one:
        log, digest, capability = await one.build()
        assert cached_steps(log) == 0
        await one.publish(capability)
    async with bench.node("two") as two:
        log, again, capability = await two.build()
        assert cached_steps(log) == STEPS
        assert again == digest
        statistics = two.store.statistics
        assert statistics.manifest_hits == 1
        assert statistics.blob_hits == 1  # the cache's configuration
        assert statistics.bytes_served < 20_000
        assert statistics.bytes_received < 20_000  # the image's and the cache's small documents
        assert statistics.shared_bytes_read < 20_000
        store = (await two.store.project("shop")).store
        layers = await layers_of(two, digest)
        assert len(layers) == STEPS
        assert not any(store.disk.has(layer) for layer in layers)
        await two.publish(capability)
        assert statistics.shared_bytes_written < 20_000

        # One source file changed: the steps before it come from the cache, with their layers.
        (bench.context / "source.txt").write_text("two")
        log, _, _ = await two.build()
        assert EXECUTED not in log
        assert statistics.shared_bytes_read > 8 << 20


async def test_builds_go_on_while_the_shared_store_is_away(bench: Bench) -> None:
    async with bench.node("one") as one:
        _, digest, capability = await one.build()
        await one.publish(capability)
    async with bench.node("two") as two:
        bench.minio.stop()
        log, other, capability = await two.build()
        assert cached_steps(log) == 0
        assert other != digest
        assert "is not reachable" in two.store.shared_state
        assert two.store.uploads is not None
        assert await two.store.uploads.pending_count() > 0
        # What this node's disk has still serves.
        two.daemon.stop()
        shutil.rmtree(two.daemon.root / "state")
        two.daemon.start()
        log, again, _ = await two.build(export_cache=False)
        assert (cached_steps(log), again) == (STEPS, other)
        bench.minio.start()
        await two.publish(capability)
        async with asyncio.timeout(10):
            while two.store.shared_state != "the shared cache is reachable":
                await asyncio.sleep(0.05)


async def test_builds_go_on_while_the_shared_store_hangs(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with bench.node("one", url) as node:
            async with asyncio.timeout(20):
                log, _, _ = await node.build()
            assert cached_steps(log) == 0


async def test_a_corrupt_object_fails_one_attempt_and_the_repeated_build_succeeds(
    bench: Bench,
) -> None:
    async with bench.node("one") as one:
        _, digest, capability = await one.build()
        await one.publish(capability)
        big = (await layers_of(one, digest))[1]
    objects = S3Store(bench.config())
    size = (await objects.stat(blob_key("shop", big))).size_bytes  # type: ignore[union-attr]
    await objects.write_bytes(blob_key("shop", big), b"\0" * size)
    await objects.close()
    async with bench.node("two") as two:
        (bench.context / "source.txt").write_text("two")
        # The first attempt meets the corrupt blob: it is refused, not passed on, and remembered.
        # BuildKit has no fallback of its own, so this build fails and its caller repeats it.
        with pytest.raises(AssertionError, match=f"could not fetch content descriptor {big}"):
            await two.build()
        assert two.store.statistics.corrupt_objects == 1
        # The manifest is rendered without it now; the daemon was not poisoned.
        log, _, capability = await two.build()
        assert EXECUTED in log
        assert two.store.statistics.corrupt_objects == 1
        await two.publish(capability)
    async with bench.node("three") as three:
        log, _, _ = await three.build()
        assert cached_steps(log) == STEPS


async def test_parallel_builds_of_two_nodes_leave_a_usable_cache(bench: Bench) -> None:
    async with bench.node("one") as one, bench.node("two") as two:
        (_, first, a), (_, second, b) = await asyncio.gather(one.build(), two.build())
        await one.publish(a)
        await two.publish(b)
    async with bench.node("three") as three:
        log, digest, _ = await three.build()
        assert cached_steps(log) == STEPS
        # Of each step the older of the two results is taken, so the image may have some of both.
        layers = set(await layers_of(three, digest))
        known = {*await layers_of(one, first), *await layers_of(two, second)}
        assert layers <= known
    assert threading.active_count() < 50
