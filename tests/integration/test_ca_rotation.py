"""One CA replaces another while builds run: no call fails, and in the end the old one is gone."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from click.testing import CliRunner, Result

from offload_builder.cli.entry import main
from offload_builder.node.renewal import issuer_of
from offload_core.errors import AuthenticationError, UsageError
from offload_core.tls import GATEWAY_NAME, KeyPair, open_channel
from offload_core.trust import fetch_pinned_ca, fingerprints
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.identity_service_pb2_grpc import IdentityServiceStub
from tests.fixtures.node import NodePool, RawClient

SECONDS = 30.0


async def command(pool: NodePool, *arguments: str) -> Result:
    data = ["--data-dir", str(pool.gateway.directory)]
    return await asyncio.to_thread(CliRunner().invoke, main, ["ca", *arguments, *data])


async def status(pool: NodePool) -> dict[str, object]:
    found: dict[str, object] = json.loads((await command(pool, "status", "--format=json")).stdout)
    return found


async def eventually(condition) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.05)


async def renewed(pool: NodePool, keys: KeyPair) -> KeyPair:
    """Do what every command does in silence when a certificate gets old."""
    async with open_channel(
        pool.gateway.address, GATEWAY_NAME, ca_pem=keys.ca_pem, keys=keys
    ) as channel:
        reply = await IdentityServiceStub(channel).Renew(
            identity_pb.RenewRequest(), metadata=call_metadata(), timeout=SECONDS
        )
    fresh = reply.certificate
    return KeyPair(fresh.certificate_pem, fresh.private_key_pem, fresh.ca_pem)


async def client_of(pool: NodePool, keys: KeyPair, steps: str) -> RawClient:
    from offload_proto.v1 import builds_service_pb2 as builds_pb
    from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub

    channel = open_channel(pool.gateway.address, GATEWAY_NAME, ca_pem=keys.ca_pem, keys=keys)
    async with channel:
        call = BuildsServiceStub(channel).Create(
            builds_pb.CreateRequest(request_id=steps, project_id="default"),
            metadata=call_metadata(),
        )
        while not (message := await call.read()).HasField("assigned"):
            pass
    assigned = message.assigned
    at_node = open_channel(
        assigned.endpoints[0], assigned.server_name, ca_pem=keys.ca_pem, keys=keys
    )
    client = RawClient(await pool._stack.enter_async_context(at_node), assigned, steps)
    client.spec.outputs.add(type=Output.TYPE_IMAGE)
    await client.start()
    return client


async def builds(pool: NodePool, keys: KeyPair, name: str) -> None:
    """Build with a certificate, from admission to result."""
    client = await client_of(pool, keys, f"RUN echo {name}\n")
    result = await client.until("result")
    assert result.success.image.digest, result
    await client.done()


@pytest.mark.timeout(150)
async def test_builds_run_through_the_whole_replacement_of_the_ca():
    async with NodePool() as pool:
        await pool.start_node(slots=4)
        server = pool._running["one"][0]
        old_token = await pool.gateway.create_token("ann", identity_pb.ROLE_MEMBER)
        old = await pool.gateway.login(old_token)
        (first,) = fingerprints(old.ca_pem)
        long_one = await client_of(pool, old, "RUN echo begun; sleep 22; echo ended\n")
        await long_one.until_text(b"begun")

        # Both are trusted; the old one signs.
        assert (await command(pool, "rotate", "--overlap", "4s")).exit_code == 0
        assert (await command(pool, "rotate")).exit_code == UsageError.exit_code
        await eventually(lambda: len(fingerprints(server.credentials.keys.ca_pem)) == 2)
        assert issuer_of(server.credentials.keys) == first
        both = await renewed(pool, old)
        assert fingerprints(both.ca_pem)[0] == first
        assert issuer_of(both) == first
        second = fingerprints(both.ca_pem)[1]
        for number, keys in enumerate((old, both)):
            await builds(pool, keys, f"prepared {number}")

        # The new one signs; certificates of both work.
        await eventually(lambda: issuer_of(server.credentials.keys) == second)
        assert (await status(pool))["stage"] == "switched"
        await builds(pool, both, "switched")
        new = await renewed(pool, both)
        assert issuer_of(new) == second
        await builds(pool, new, "switched with a new certificate")
        pinned = await fetch_pinned_ca(pool.gateway.address, old_token)
        assert set(fingerprints(pinned)) == {first, second}
        refused = await command(pool, "finish")
        assert refused.exit_code == UsageError.exit_code
        assert "certificates of members" in refused.stderr

        # Only the new one is trusted. Who was there has noticed nothing.
        assert (await command(pool, "finish", "--force")).exit_code == 0
        await eventually(lambda: fingerprints(server.credentials.keys.ca_pem) == (second,))
        await builds(pool, new, "finished")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await renewed(pool, both)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await long_one.until_text(b"ended")
        result = await long_one.until("result")
        assert result.success.image.digest
        await long_one.done()

        # A token of before leads to the new CA, for people and for nodes.
        pinned = await fetch_pinned_ca(pool.gateway.address, old_token)
        assert fingerprints(pinned)[0] == second
        again = await pool.gateway.login(old_token)
        assert fingerprints(again.ca_pem) == (second,)
        pool.keys = await pool.gateway.login()
        await pool.start_node("two")
        await pool.stop_node("one")
        await builds(pool, again, "at a node that was enrolled later")


async def test_tokens_of_a_stolen_ca_are_refused():
    async with NodePool() as pool:
        token = await pool.gateway.create_token("ann", identity_pb.ROLE_MEMBER)
        assert (await command(pool, "rotate", "--overlap", "0s")).exit_code == 0
        await eventually(lambda: pool.gateway.gateway._authority.rotation is not None
                         and pool.gateway.gateway._authority.rotation.switched_at)  # fmt: skip
        done = await command(pool, "finish", "--force", "--forget-tokens")
        assert done.exit_code == 0, done.output
        await eventually(lambda: len(fingerprints(pool.gateway.ca_pem)) == 1)
        with pytest.raises(AuthenticationError, match="another fingerprint"):
            await fetch_pinned_ca(pool.gateway.address, token)
        error = None
        try:
            await pool.gateway.login(token)
        except grpc.aio.AioRpcError as caught:
            error = caught
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "another gateway" in error.details()


async def test_new_ca_can_be_taken_back_before_it_signs():
    async with NodePool() as pool:
        before = (await status(pool))["signs"]
        assert (await command(pool, "rotate")).exit_code == 0
        assert (await command(pool, "finish")).exit_code == UsageError.exit_code
        found = await status(pool)
        assert (found["stage"], found["signs"]) == ("prepared", before)
        assert (await command(pool, "rotate", "--abandon")).exit_code == 0
        found = await status(pool)
        assert (found["stage"], found["signs"], found["trusted"]) == ("none", before, [])
