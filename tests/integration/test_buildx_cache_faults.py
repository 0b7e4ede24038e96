"""Cached content that the pool's store does not give: a miss for docker buildx, not a failure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tarfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.buildx import Buildx
from tests.fixtures.faultyproxy import Fault, FaultyProxy
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, wait_free
from tests.integration.test_node_store_faults import Bucket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from offload_builder.node.agent import NodeAgent

STEPS = "RUN busybox dd if=/dev/urandom of=/big bs=1M count=3 && busybox sha256sum /big > /sum\n"
MORE = "RUN busybox sha256sum -c /sum && echo all-is-well\n"
NOTE = "cached content could not be read; its steps are built again"
BLOBS = r"/blobs/"


class Shared:
    """A pool whose nodes share a bucket behind a proxy that injects faults."""

    def __init__(self, pool: NodePool, bucket: Bucket, proxy: FaultyProxy) -> None:
        self.pool = pool
        self.bucket = bucket
        self.proxy = proxy
        self.options = {**bucket.options, "s3_endpoint": proxy.endpoint_url}

    async def publish(self, user: Buildx) -> None:
        """Build at a first node, and take that node away when all is in the bucket."""
        await self.pool.start_node("one", **self.options)
        user.dockerfile(STEPS)
        result = await user.build()
        assert result.code == 0, result.output
        stub = BuildsServiceStub(await self.pool.gateway.channel(self.pool.keys))
        async with asyncio.timeout(30):
            while True:
                reply = await stub.List(
                    builds_pb.ListRequest(), metadata=call_metadata(), timeout=20
                )
                if reply.builds[0].cache_state == builds_pb.CACHE_STATE_PUBLISHED:
                    break
                await asyncio.sleep(0.05)
        await self.pool.stop_node("one")

    async def second_node(self) -> NodeAgent:
        """Start an empty node."""
        return await self.pool.start_node("two", **self.options)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with MinioServer(tmp_path) as minio:
        yield Bucket(minio)


@asynccontextmanager
async def sharing(bucket: Bucket) -> AsyncIterator[tuple[Shared, Buildx]]:
    """Yield a pool, and a user whose steps are in its bucket and nowhere else."""
    port = int(bucket.options["s3_endpoint"].rpartition(":")[2])
    with FaultyProxy(port) as proxy:
        async with NodePool() as pool, Buildx(pool.gateway.address, pool.keys) as user:
            shared = Shared(pool, bucket, proxy)
            await shared.publish(user)
            user.dockerfile(STEPS + MORE)
            yield shared, user


@pytest.mark.parametrize("harm", ["vanished", "cut", "corrupt"])
async def test_a_layer_that_is_not_what_was_promised_is_built_again(
    bucket: Bucket, harm: str
) -> None:
    async with sharing(bucket) as (shared, user):
        key, data = bucket.large_layer()
        if harm == "vanished":
            bucket.delete(key)
        elif harm == "cut":
            bucket.put(key, data[: len(data) // 2])
        else:
            bucket.put(key, data[:1000] + os.urandom(1000) + data[2000:])
        agent = await shared.second_node()
        result = await user.build("--metadata-file", "meta.json")
        assert result.code == 0, result.output
        assert "all-is-well" in result.output
        assert NOTE in result.output
        assert "ERROR" not in result.output
        # The client finds the record of its build under the name that it has given.
        ref = json.loads((user.context / "meta.json").read_text())["buildx.build.ref"]
        name = ref.rpartition("/")[2]
        assert name in await user.ok("history", "ls", "--format", "{{.Ref}}")
        assert "all-is-well" in await user.ok("history", "logs", name)
        await wait_free(agent)
        again = await user.build()
        assert again.output.count("CACHED") == 4, again.output
        assert NOTE not in again.output


@pytest.mark.parametrize("fault", [Fault.FORBIDDEN, Fault.ILL, Fault.CUT, Fault.SILENT, None])
async def test_a_store_that_refuses_or_is_gone_costs_steps_and_no_build(
    bucket: Bucket, fault: Fault | None
) -> None:
    async with sharing(bucket) as (shared, user):
        agent = await shared.second_node()
        # The cache is known to the node before its store fails.
        user.dockerfile("RUN echo other\n", "Dockerfile.other")
        warm = await user.build("-f", "Dockerfile.other")
        assert warm.code == 0, warm.output
        rule = None
        if fault is None:
            shared.proxy.go_down()
        else:
            rule = shared.proxy.add(fault, "GET", "HEAD", key=BLOBS)
        result = await user.build()
        assert result.code == 0, result.output
        assert "all-is-well" in result.output
        if rule is None:
            shared.proxy.come_up()
        else:
            assert rule.hits
        shared.proxy.heal()
        await wait_free(agent)


async def test_a_target_that_others_are_based_on_is_built_again(bucket: Bucket) -> None:
    async with sharing(bucket) as (shared, user):
        key, _ = bucket.large_layer()
        bucket.delete(key)
        agent = await shared.second_node()
        user.dockerfile(STEPS)
        (user.context / "Dockerfile.app").write_text(f"FROM base\n{MORE}")
        (user.context / "docker-bake.hcl").write_text(
            'group "default" { targets = ["base", "app"] }\n'
            'target "base" {}\n'
            'target "app" {\n dockerfile = "Dockerfile.app"\n'
            ' contexts = { base = "target:base" }\n}\n'
        )
        result = await user.run("bake", "--progress", "plain")
        assert result.code == 0, result.output
        assert "all-is-well" in result.output
        assert NOTE in result.output
        await wait_free(agent)


async def test_buildctl_repeats_as_well(bucket: Bucket) -> None:
    async with sharing(bucket) as (shared, user):
        key, _ = bucket.large_layer()
        bucket.delete(key)
        await shared.second_node()
        result = await user.buildctl(
            "build", "--progress=plain", "--frontend=dockerfile.v0", "--local=context=.",
            "--local=dockerfile=.",
        )  # fmt: skip
        assert result.code == 0, result.output
        assert "all-is-well" in result.output
        assert NOTE in result.output


@pytest.mark.parametrize("kind", ["oci", "docker", "tar"])
async def test_a_fault_that_only_the_exporter_meets_is_a_miss(bucket: Bucket, kind: str) -> None:
    async with sharing(bucket) as (shared, user):
        key, _ = bucket.large_layer()
        bucket.delete(key)
        agent = await shared.second_node()
        # Nothing runs, so nothing is read before the exporter reads it.
        user.dockerfile(STEPS)
        result = await user.build("-o", f"type={kind},dest=image.tar")
        assert result.code == 0, result.output
        assert NOTE in result.output
        with tarfile.open(user.context / "image.tar") as image:
            names = image.getnames()
            if kind == "tar":
                big, summary = image.extractfile("big"), image.extractfile("sum")
                assert big is not None and summary is not None
                assert hashlib.sha256(big.read()).hexdigest() in summary.read().decode()
            for name in names:
                if name.startswith("blobs/sha256/") and len(name) > len("blobs/sha256/"):
                    file = image.extractfile(name)
                    assert file is not None
                    assert hashlib.sha256(file.read()).hexdigest() in name
        await wait_free(agent)
