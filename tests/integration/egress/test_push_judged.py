"""Pushes of a node whose builds are behind the firewall, by the node itself, which is not."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from aiohttp import web

from offload_core.versions import call_metadata
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.egressworld import ALLOWED, METADATA, PRIVATE
from tests.fixtures.node import NodePool, RawClient

NAMES = {"lan.example": PRIVATE, "meta.example": METADATA, "here.example": "127.0.0.1"}
ALLOWLIST = """\
posture = "allowlist"

[[rule]]
id = "token-service"
allow = ["auth.example"]
"""


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """The names of this machine's resolver; returns which were looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def find(host, *args, **options):
        asked.append(host)
        return real(NAMES.get(host, host), *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    return asked


@pytest.fixture
def machine(world, monkeypatch):
    """The namespace that nodes take for their machine's."""
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    return world.machine


@dataclass
class LeadingRegistry:
    """Takes every image, and leads elsewhere as a test wants it.

    Attributes:
        uploads: begin of the URL where blobs are to be sent.
        realm: of its token service; empty for none.
        asked: method and host of each request.
    """

    port: int = 0
    uploads: str = ""
    realm: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append((request.method, request.host))
        async for _ in request.content.iter_any():
            pass
        if request.path == "/token":
            return web.json_response({"token": "a-token"})
        if self.realm and "Authorization" not in request.headers:
            challenge = f'Bearer realm="{self.realm}",service="test"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if request.method == "POST":
            place = f"{self.uploads}/v2/app/blobs/uploads/1"
            return web.Response(status=202, headers={"Location": place})
        return web.Response(status=201 if request.method == "PUT" else 404)


@asynccontextmanager
async def leading_registry():
    """Run one at all addresses of this machine."""
    one = LeadingRegistry()
    runner = web.ServerRunner(web.Server(one.answer))
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    one.port = runner.addresses[0][1]
    try:
        yield one
    finally:
        await runner.cleanup()


@asynccontextmanager
async def built_image(tmp_path, policy: str = "", **options):
    """Yield a registry of the configuration, and who has built an image on an isolated node."""
    async with NodePool() as pool, leading_registry() as registry:
        config = tmp_path / "registries.toml"
        hosts = (f"127.0.0.1:{registry.port}", f"here.example:{registry.port}")
        config.write_text("".join(f'[registry."{host}"]\nhttp = true\n' for host in hosts))
        settings = {"isolation": "netns", "registry_config": config} | options
        await pool.start_node(ended_keep=60.0, **settings)
        assigned = await pool.assigned()
        client = RawClient(await pool.channel(assigned), assigned)
        client.dockerfile = "FROM scratch\nCOPY busybox /bin/\n"
        client.spec.outputs.add(type=Output.TYPE_IMAGE)
        await client.start()
        result = await client.until("result")
        assert result.HasField("success"), result
        await client.done()
        if policy:
            stub = EgressServiceStub(await pool.gateway.channel(await pool.gateway.login("")))
            request = ApplyPolicyRequest(text=policy, file="policy.toml")
            await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
            async with asyncio.timeout(20):
                policies = pool._running["one"][0].policies
                await policies.wait_for(lambda held: held.versions() == {"": 1})
        yield registry, client, result.success.image.digest


async def refused(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, caught.value.details()
    sentence = caught.value.details()
    assert sentence.startswith("egress: ")
    return sentence


async def test_protected_addresses_are_never_pushed_to(machine, tmp_path):
    async with built_image(tmp_path) as (registry, client, digest):
        own = f"127.0.0.1:{registry.port}"
        pushed = await client.push(f"{own}/app:one")
        assert pushed.digest == digest
        assert pushed.sent_bytes > 100_000
        registry.realm = f"http://{own}/token"
        assert (await client.push(f"{own}/app:two")).sent_bytes > 100_000
        registry.realm = ""
        registry.asked.clear()
        # By name, also one of the configuration: what a name leads to may be somebody else's word.
        for name, address in NAMES.items():
            host = f"{name}:{registry.port}"
            said = await refused(client.push(f"{host}/app:one"))
            assert said.startswith(f"egress: {host} was refused: {address} is protected")
            assert "(rule protected-" in said
        for address in (PRIVATE, METADATA, "127.0.0.2"):
            said = await refused(client.push(f"{address}:{registry.port}/app:one"))
            assert f"{registry.port}/app was refused: {address} is protected" in said
        request = node_pb.PushIndexRequest(
            build_id=client.assigned.build_id,
            names=[f"lan.example:{registry.port}/app:one"],
            parts=[digest],
        )
        index = client._stub.PushIndex(request, metadata=client.metadata, timeout=20)
        assert f"was refused: {PRIVATE} is protected" in await refused(index)
        assert registry.asked == []
        # An allowed registry leads elsewhere.
        for host in ("lan.example", "meta.example", "127.0.0.2", "localhost"):
            elsewhere = f"http://{host}:{registry.port}"
            registry.uploads, registry.realm = elsewhere, ""
            said = await refused(client.push(f"{own}/app:one"))
            assert said.startswith(f"egress: {host}:{registry.port} was refused: ")
            assert said.endswith(f"; {own}/app:one was not pushed")
            registry.realm = f"{elsewhere}/token"
            said = await refused(client.push(f"{own}/app:one"))
            assert said.startswith(f"egress: {host}:{registry.port} was refused: ")
        assert {host for _, host in registry.asked} == {own}


async def test_an_allowed_registry_leads_only_where_the_policy_allows(
    machine, tmp_path, names, monkeypatch
):
    async with built_image(tmp_path, ALLOWLIST) as (registry, client, _):
        own = f"127.0.0.1:{registry.port}"
        assert (await client.push(f"{own}/app:one")).sent_bytes > 100_000
        registry.uploads = f"http://cdn.example:{registry.port}"
        said = await refused(client.push(f"{own}/app:one"))
        assert said.startswith(f"egress: cdn.example:{registry.port} was refused: no rule of ")
        assert '(rule default-deny: posture "allowlist", policy.toml)' in said
        assert "cdn.example" not in names
        # Its name is allowed, but nobody allowed a token service within the node.
        registry.uploads, registry.realm = "", f"http://auth.example:{registry.port}/token"
        monkeypatch.setitem(NAMES, "auth.example", "127.0.0.1")
        said = await refused(client.push(f"{own}/app:one"))
        assert "127.0.0.1 is protected" in said
        assert "auth.example" in names


async def test_nothing_is_judged_on_a_node_without_firewall_and_policy(tmp_path):
    async with built_image(tmp_path, isolation="none") as (registry, client, _):
        registry.uploads = f"http://localhost:{registry.port}"
        registry.realm = f"http://here.example:{registry.port}/token"
        pushed = await client.push(f"localhost:{registry.port}/app:one")
        assert pushed.sent_bytes > 100_000


async def test_token_services_are_asked_only_where_builds_may_go(world, machine, tmp_path):
    # BuildKit asks the registry from behind the firewall, and has the node ask its token service.
    registry = LeadingRegistry()
    runner = web.ServerRunner(web.Server(registry.answer))
    await runner.setup()
    await web.SockSite(runner, await world.world.listen_tcp(ALLOWED, 5000)).start()
    config = tmp_path / "registries.toml"
    config.write_text(f'[registry."{ALLOWED}:5000"]\nhttp = true\n')
    try:
        async with NodePool() as pool:
            await pool.start_node(
                isolation="netns", registry_config=config, base_images=False, ended_keep=0.0
            )
            for host, address in (("meta.example", METADATA), ("127.0.0.1", "127.0.0.1")):
                registry.realm = f"http://{host}/token"
                assigned = await pool.assigned()
                client = RawClient(await pool.channel(assigned), assigned)
                client.dockerfile = f"FROM {ALLOWED}:5000/app:one\n"
                await client.start()
                result = await client.until("result")
                await client.done()
                said = result.failure.message
                assert f"egress: {host} was refused: {address} is protected" in said
                uses = [use for seen in client.seen for use in seen.progress.egress]
                assert (False, address) in {(use.allowed, use.address) for use in uses}, uses
    finally:
        await runner.cleanup()
    assert registry.asked
