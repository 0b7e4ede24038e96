"""The image of a build that has ended goes from its node to registries."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.upstreams import TokenService, counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BIG = "RUN dd if=/dev/urandom of=/big bs=1M count=12 2>/dev/null\n"


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


async def built(pool: NodePool, *platforms: str) -> tuple[RawClient, str]:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, BIG)
    client.spec.outputs.add(type=Output.TYPE_IMAGE)
    client.spec.platforms.extend(platforms)
    if len(platforms) > 1:
        # Nothing has to run for a platform that is not the machine's.
        client.dockerfile = (
            "FROM scratch\nCOPY busybox /bin/\nARG TARGETARCH\nLABEL a=$TARGETARCH\n"
        )
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    return client, result.success.image.digest


def manifest(registry: DockerRegistry, name: str, reference: str) -> dict[str, Any]:
    kinds = ("manifest", "index")
    request = urllib.request.Request(
        f"http://{registry.address}/v2/{name}/manifests/{reference}",
        headers={"Accept": ",".join(f"application/vnd.oci.image.{k}.v1+json" for k in kinds)},
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


async def test_image_is_pushed_and_not_sent_twice(pool, tmp_path: Path):
    await pool.start_node(ended_keep=60.0)
    client, digest = await built(pool)
    with DockerRegistry(tmp_path / "r", auth={}) as registry:
        name = f"{registry.address}/team/app"
        first = await client.push(f"{name}:one")
        assert first.digest == digest
        assert first.sent_bytes > 12 << 20
        again = await client.push(f"{name}:two")
        assert again.sent_bytes < 10_000
        # To another repository of the registry blobs are mounted.
        both = await client.push(f"{name}:three", f"{registry.address}/other:three")
        assert both.sent_bytes < 20_000
        assert counted(registry, "HEAD", "/v2/team/app/blobs/") > 0
        assert len(manifest(registry, "other", "three")["layers"]) == 3


async def test_image_of_an_ended_build_is_its_members_only(pool):
    await pool.start_node(ended_keep=60.0)
    client, digest = await built(pool)
    for name, role in (("mallory", identity_pb.ROLE_MEMBER), ("root", identity_pb.ROLE_ADMIN)):
        keys = await pool.gateway.login(await pool.gateway.create_token(name, role))
        thief = RawClient(await pool.channel(client.assigned, keys), client.assigned)
        with pytest.raises(grpc.RpcError, match="there is no build") as caught:
            await thief.push("127.0.0.1:1/app:one")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        wanted = node_pb.DownloadRequest(digest=digest)
        with pytest.raises(grpc.RpcError, match="there is no build"):
            await thief.blobs.Download(wanted, metadata=thief.metadata).read()
    wanted = node_pb.DownloadRequest(digest=digest)
    assert (await client.blobs.Download(wanted, metadata=client.metadata).read()).data


async def test_index_of_several_platforms_is_pushed_whole(pool, tmp_path: Path):
    await pool.start_node(ended_keep=60.0, platforms=["linux/amd64", "linux/arm64"])
    client, digest = await built(pool, "linux/amd64", "linux/arm64")
    with DockerRegistry(tmp_path / "r", auth={}) as registry:
        reply = await client.push(f"{registry.address}/app:multi")
        assert reply.digest == digest
        index = manifest(registry, "app", "multi")
        assert len(index["manifests"]) >= 2
        for child in index["manifests"]:
            found = manifest(registry, "app", child["digest"])
            assert found["layers"]


async def test_registry_with_logins_takes_the_right_one_only(pool, tmp_path: Path):
    await pool.start_node(ended_keep=60.0)
    client, _ = await built(pool)
    with DockerRegistry(tmp_path / "r") as registry:
        name = f"{registry.address}/app:one"
        for logins in (
            {},
            {registry.address: node_pb.RegistryLogin(username=USER, secret="wrong")},
        ):
            with pytest.raises(grpc.RpcError, match="refused to take") as caught:
                await client.push(name, **logins)
            assert "wrong" not in (caught.value.details() or "")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        good = {registry.address: node_pb.RegistryLogin(username=USER, secret=PASSWORD)}
        assert (await client.push(name, **good)).sent_bytes > 12 << 20


async def test_token_service_gives_the_right_to_push(pool, tmp_path: Path):
    await pool.start_node(ended_keep=60.0)
    client, _ = await built(pool)
    service = TokenService(tmp_path / "tokens")
    async with service.run() as auth:
        with DockerRegistry(tmp_path / "r", auth=auth) as registry:
            login = node_pb.RegistryLogin(username=USER, secret=PASSWORD)
            names = [f"{registry.address}/{name}:one" for name in ("app", "other")]
            assert (await client.push(*names, **{registry.address: login})).sent_bytes > 12 << 20
    assert {True} == {allowed for _, allowed in service.asked}
    assert any("push" in scope for scope, _ in service.asked)


async def test_what_cannot_be_pushed_is_said(pool, tmp_path: Path):
    await pool.start_node(ended_keep=60.0)
    client, _ = await built(pool)
    with pytest.raises(grpc.RpcError, match="no image name with a registry and a tag"):
        await client.push("app")
    registry = DockerRegistry(tmp_path / "r", auth={})
    with pytest.raises(grpc.RpcError, match="could not be pushed") as caught:
        await client.push(f"{registry.address}/app:one")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
