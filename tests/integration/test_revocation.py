"""A revoked token works nowhere within seconds: gateway, nodes, open calls, builds, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

import grpc
import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from offload_core.errors import GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.tls import open_channel
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.node_service_pb2_grpc import BlobsServiceStub, NodeBuildsServiceStub
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.oidcgateway import OidcGateway
from tests.integration.attachednode import AttachedNode

SECONDS = 20.0
SLEEPS = "RUN echo begun; sleep 60\n"


@pytest.fixture
async def pool():
    async with NodePool() as running:
        yield running


async def member(pool: NodePool, name: str = "ann"):
    token = await pool.gateway.create_token(name, identity_pb.ROLE_MEMBER)
    return token.split("_")[1], await pool.gateway.login(token)


async def started(pool: NodePool, keys, steps: str) -> RawClient:
    assigned = await pool.assigned(keys)
    client = RawClient(await pool.channel(assigned, keys), assigned, steps)
    client.spec.outputs.add(type=Output.TYPE_IMAGE)
    await client.start()
    return client


def logins(oidc: OidcGateway) -> list[str]:
    data = ["--data-dir", str(oidc.gateway.directory)]
    result = CliRunner().invoke(main, ["identity", "logins", *data], catch_exceptions=False)
    return re.findall(r"^9[a-z2-7]{11}", result.stdout, re.MULTILINE)


def revoke_by_command(pool: NodePool | OidcGateway, *arguments: str) -> None:
    """Revoke as an administrator does on the gateway's machine, beside the gateway."""
    data = ["--data-dir", str(pool.gateway.directory)]
    result = CliRunner().invoke(main, [*arguments, *data], catch_exceptions=False)
    assert result.exit_code == 0, result.output


async def ended_with(call) -> grpc.StatusCode:
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code()


async def rejoin_code(client: RawClient) -> grpc.StatusCode:
    await client.rejoin()
    return await ended_with(client.call)


async def test_command_ends_open_streams_and_builds_of_a_token_everywhere(pool):
    agent = await pool.start_node()
    token_id, keys = await member(pool)
    client = await started(pool, keys, SLEEPS)
    await client.until_text(b"begun")
    build_id = client.assigned.build_id
    logs = BuildsServiceStub(await pool.gateway.channel(keys)).Logs(
        builds_pb.LogsRequest(build_id=build_id, follow=True), metadata=call_metadata()
    )
    await logs.read()
    upload = BlobsServiceStub(await pool.channel(client.assigned, keys)).Upload(
        metadata=client.metadata
    )
    buildkit = open_channel(
        pool._running["one"][0].buildkit_port.address,
        "default.buildkit.offload",
        ca_pem=keys.ca_pem,
        keys=keys,
    )
    stock = await pool._stack.enter_async_context(buildkit)
    info = stock.unary_unary("/moby.buildkit.v1.Control/Info")
    assert await info(b"", timeout=SECONDS)
    began = time.monotonic()
    await asyncio.to_thread(revoke_by_command, pool, "token", "revoke", token_id)
    codes = await asyncio.gather(*(ended_with(call) for call in (client.call, logs, upload)))
    took = time.monotonic() - began
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
    assert "was revoked" in await client.call.details()
    assert took < 12, took
    with pytest.raises(grpc.aio.AioRpcError, match="was revoked"):
        await info(b"", timeout=SECONDS, wait_for_ready=True)
    await pool.wait_state(build_id, builds_pb.BUILD_STATE_CANCELED)
    async with asyncio.timeout(SECONDS):
        while build_id in agent.slots.builds:
            await asyncio.sleep(0.05)


async def test_revoked_member_reaches_none_of_its_builds_also_after_restarts(pool):
    await pool.start_node(ended_keep=60.0)
    token_id, keys = await member(pool)
    other_id, other = await member(pool)
    client = await started(pool, keys, "")
    result = await client.until("result")
    digest = result.success.image.digest
    await client.done()
    request = identity_pb.RevokeTokenRequest(token_id=token_id)
    await (await pool.gateway.admin()).RevokeToken(request, metadata=call_metadata(), timeout=10)
    server = pool._running["one"][0]
    async with asyncio.timeout(5):
        while token_id not in server.revocations:
            await asyncio.sleep(0.01)
    assert await rejoin_code(client) is grpc.StatusCode.UNAUTHENTICATED
    await pool.gateway.stop()
    await pool.stop_node("one")
    # The node alone: what it has heard outlives its process, and needs no gateway.
    config = server.config
    fresh = type(server)(config)
    async with fresh:
        for identity, code in ((keys, "UNAUTHENTICATED"), (other, "OK")):
            async with open_channel(
                fresh.address, "one.node.offload", ca_pem=keys.ca_pem, keys=identity
            ) as channel:
                call = BlobsServiceStub(channel).Download(
                    node_pb.DownloadRequest(digest=digest, manifest=True), metadata=client.metadata
                )
                assert (await ended_with(call)).name == code
                push = NodeBuildsServiceStub(channel).PushImage(
                    node_pb.PushImageRequest(build_id=client.assigned.build_id, names=["x/y:z"]),
                    metadata=client.metadata,
                    timeout=SECONDS,
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await push
                refused = caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert refused == (code == "UNAUTHENTICATED")
    assert other_id not in fresh.revocations


async def test_revocation_while_the_gateway_is_away_counts_when_it_is_back():
    async with NodePool() as pool:
        await pool.start_node()
        token_id, keys = await member(pool)
        client = await started(pool, keys, SLEEPS)
        await client.until_text(b"begun")
        port = pool.gateway.address.rpartition(":")[2]
        await pool.gateway.stop()
        await asyncio.to_thread(revoke_by_command, pool, "token", "revoke", token_id)
        pool.gateway.options["listen"] = f"127.0.0.1:{port}"
        await pool.gateway.start()
        assert await ended_with(client.call) is grpc.StatusCode.UNAUTHENTICATED
        pool.keys = await pool.gateway.login()
        pool.gateway._stack = type(pool.gateway._stack)()
        await pool.wait_state(client.assigned.build_id, builds_pb.BUILD_STATE_CANCELED)


async def test_revoked_node_is_sent_away_and_its_token_goes_on(pool):
    await pool.start_node()
    server, task = pool._running["one"]
    words = ["node", "list", "--format", "json", "--data-dir", str(pool.gateway.directory)]
    listed = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert listed.exit_code == 0, listed.output
    assert '"node": "one"' in listed.output or '"node":"one"' in listed.output
    await asyncio.to_thread(revoke_by_command, pool, "node", "revoke", "one")
    with pytest.raises(Exception, match="was revoked"):
        await asyncio.wait_for(asyncio.shield(task), SECONDS)
    assert pool.gateway.gateway.attached_nodes() == []
    keys = server.agent.identity.keys
    from offload_proto.v1.identity_service_pb2_grpc import IdentityServiceStub

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await IdentityServiceStub(await pool.gateway.channel(keys)).RenewNode(
            identity_pb.RenewNodeRequest(), metadata=call_metadata(), timeout=10
        )
    error = error_from_rpc(caught.value, peer="it", unreachable=GatewayUnreachableError)
    assert "was revoked" in error.message


async def test_login_by_an_identity_provider_is_revoked_at_nodes_as_well():
    async with OidcGateway() as oidc:
        keys = await oidc.gateway.enroll_node("one")
        async with AttachedNode(oidc.gateway, "one", keys) as node:
            await oidc.exchange(oidc.provider.token())
            (login,) = await asyncio.to_thread(logins, oidc)
            await asyncio.to_thread(revoke_by_command, oidc, "token", "revoke", login)
            await node.eventually(lambda: login in node.revoked)
