"""Stock docker buildx and what surrounds it: an engine, a second node, a restart of the gateway."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.buildx import Buildx, finished, until_output
from tests.fixtures.engine import DockerEngine
from tests.fixtures.minio import MinioServer
from tests.fixtures.node import NodePool, wait_free
from tests.fixtures.ports import free_port
from tests.integration.test_node_store_faults import Bucket

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.engine import StoreKind

CERTIFICATE_SECONDS = 3.0
TOLD_SECONDS = 2.0
END_SECONDS = 5.0


async def newest(pool: NodePool) -> builds_pb.Build:
    """Return the newest build of the history."""
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    reply = await stub.List(builds_pb.ListRequest(), metadata=call_metadata(), timeout=20)
    return reply.builds[0]


@pytest.mark.parametrize("kind", ["graphdriver", "containerd"])
async def test_load_puts_the_image_into_a_docker_engine(kind: StoreKind) -> None:
    with DockerEngine(kind) as engine:
        async with NodePool() as pool:
            agent = await pool.start_node()
            async with Buildx(pool.gateway.address, pool.keys) as user:
                user.environment |= {"DOCKER_HOST": engine.host, "BUILDX_BUILDER": "pool"}
                result = await user.build("-t", "shop/app:1", "--load")
                assert result.code == 0, result.output
                made = engine.docker("create", "--name=made", "--network=none", "shop/app:1", "x")
                assert made.returncode == 0, made.stderr
                copied = engine.docker("cp", "made:/hello", "-")
                with tarfile.open(fileobj=io.BytesIO(copied.stdout)) as archive:
                    file = archive.extractfile("hello")
                    assert file is not None and file.read() == b"hello\n"
                again = await user.build("-t", "shop/app:2", "--load")
                assert again.output.count("CACHED") == 3, again.output
                assert engine.inspect("shop/app:1")["Id"] == engine.inspect("shop/app:2")["Id"]
            await wait_free(agent)


async def test_an_image_for_two_platforms_has_both() -> None:
    async with NodePool() as pool:
        # Nothing runs, so nothing has to be emulated.
        await pool.start_node(emulated_platforms=["linux/arm64"])
        async with Buildx(pool.gateway.address, pool.keys) as user:
            (user.context / "Dockerfile").write_text(
                "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /which\n"
            )
            for name in ("amd64", "arm64"):
                (user.context / name).write_text(name)
            result = await user.build(
                "--platform", "linux/amd64,linux/arm64", "-o", "type=oci,dest=image.tar"
            )
            assert result.code == 0, result.output
            with tarfile.open(user.context / "image.tar") as image:

                def read(digest: str) -> dict[str, object]:
                    file = image.extractfile("blobs/" + digest.replace(":", "/"))
                    assert file is not None
                    found: dict[str, object] = json.load(file)
                    return found

                outer = image.extractfile("index.json")
                assert outer is not None
                (index,) = json.load(outer)["manifests"]
                manifests = read(index["digest"])["manifests"]
            assert isinstance(manifests, list)
            platforms = {item["platform"]["architecture"] for item in manifests}
            assert platforms == {"amd64", "arm64"}


async def test_a_build_is_cached_on_the_other_node_when_its_own_drains(tmp_path: Path) -> None:
    with MinioServer(tmp_path) as minio:
        bucket = Bucket(minio)
        async with NodePool() as pool, Buildx(pool.gateway.address, pool.keys) as user:
            for name in ("one", "two"):
                await pool.start_node(name, **bucket.options)
            first = await user.build()
            assert first.code == 0, first.output
            async with asyncio.timeout(30):
                while (await newest(pool)).cache_state != builds_pb.CACHE_STATE_PUBLISHED:
                    await asyncio.sleep(0.05)
            used = (await newest(pool)).node_id
            await pool.stop_node(used)
            second = await user.build()
            assert second.code == 0, second.output
            assert (await newest(pool)).node_id == ({"one", "two"} - {used}).pop()
            assert second.output.count("CACHED") == 3, second.output


async def test_an_expired_certificate_is_refused_with_what_to_do() -> None:
    async with NodePool(member_certificate_lifetime=CERTIFICATE_SECONDS) as pool:
        await pool.start_node()
        async with Buildx(pool.gateway.address, await pool.gateway.login()) as user:
            assert (await user.build()).code == 0
            await asyncio.sleep(CERTIFICATE_SECONDS)
            result = await user.build()
            assert result.code != 0
            assert "run: offload login" in result.output
            assert "deadline" not in result.output
            assert result.seconds < TOLD_SECONDS


@pytest.mark.parametrize("advertise", [[], ["127.0.0.1:0"]], ids=["private-node", "public-node"])
async def test_a_restart_of_the_gateway_ends_builds_of_its_connections_at_once(
    advertise: list[str],
) -> None:
    # The bytes of these clients pass the gateway whether or not the node can be reached.
    async with NodePool(listen=f"127.0.0.1:{free_port()}") as pool:
        agent = await pool.start_node(slots=1, advertise=advertise)
        async with Buildx(pool.gateway.address, pool.keys) as user:
            user.dockerfile("RUN sleep 60\n")
            runs = await user.start("build", "--progress", "plain", ".")
            await until_output(runs, "RUN sleep 60")
            waits = await user.start("build", "--progress", "plain", "--no-cache", ".")
            await until_output(waits, "queue position 1")
            await pool.gateway.stop()
            pool.link.cut()
            for build in (runs, waits):
                result = await finished(build, END_SECONDS)
                assert result.code != 0
                assert "error reading from server" in result.output
                if build is waits:
                    assert "keeps its place while this connection lasts" in result.output
            await pool.gateway.start()
            pool.link.up = True
            await asyncio.wait_for(pool.gateway.gateway.wait_for_nodes(["one"]), 20)
            user.dockerfile("RUN echo again\n")
            again = await user.build()
            assert again.code == 0, again.output
            await wait_free(agent)


async def test_builds_that_have_to_wait_are_spread_over_the_nodes() -> None:
    async with NodePool() as pool:
        for name in ("one", "two"):
            await pool.start_node(name, slots=1)
        async with Buildx(pool.gateway.address, pool.keys) as user:
            user.dockerfile("RUN sleep 6\n")
            running = []
            for number in range(4):
                build = await user.start(
                    "build", "--progress", "plain", "--build-arg", f"N={number}", "--no-cache", "."
                )
                await until_output(build, "RUN sleep" if number < 2 else "queue position")
                running.append(build)
            for build in running:
                assert (await finished(build)).code == 0
        stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
        reply = await stub.List(builds_pb.ListRequest(), metadata=call_metadata(), timeout=20)
        nodes = [build.node_id for build in reply.builds]
        assert sorted(nodes) == ["one", "one", "two", "two"]
