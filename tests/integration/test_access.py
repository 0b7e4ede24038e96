"""Enrolment once, certificates that are renewed at work, limits on logins, and the audit log."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import ssl
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from offload_builder.node import renewal
from offload_core.errors import QuotaExceededError
from offload_core.trust import split_address
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.build_spec_pb2 import Output
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.identity_service_pb2_grpc import AdminServiceStub, IdentityServiceStub
from tests.fixtures.gateway import RunningGateway, failure
from tests.fixtures.node import NodePool, RawClient
from tests.integration.attachednode import AttachedNode

if TYPE_CHECKING:
    from offload_builder.node.server import NodeServer

SECONDS = 15.0


@pytest.fixture
async def gateway():
    async with RunningGateway() as running:
        yield running


async def command(gateway: RunningGateway, *arguments: str) -> str:
    data = ["--data-dir", str(gateway.directory)]
    done = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, *data])
    assert done.exit_code == 0, done.output
    return done.stdout


async def records(gateway: RunningGateway, *arguments: str) -> list[dict[str, object]]:
    text = await command(gateway, "audit", "--format", "json", *arguments)
    # The gateway of this process writes its own log between them.
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def leaf_of(address: str) -> bytes | None:
    """Return the certificate that a node shows to clients of BuildKit's API, DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(split_address(address), timeout=SECONDS) as raw,
        context.wrap_socket(raw, server_hostname="default.buildkit.offload") as tls,
    ):
        return tls.getpeercert(binary_form=True)


async def eventually_ended(gateway: RunningGateway) -> None:
    async with asyncio.timeout(SECONDS):
        while not await records(gateway, "--action", "build.ended"):
            await asyncio.sleep(0.1)


async def test_token_of_a_node_enrols_one_node(gateway):
    token = await gateway.create_token("pool", identity_pb.ROLE_NODE)
    await gateway.enroll_node("one", token)
    for name in ("one", "two"):
        error = await failure(gateway.enroll_node(name, token))
        assert 'the last node that it enrolled is "one"' in error.message
        assert "--role node" in error.hint
    assert "used" in await command(gateway, "token", "list")


async def test_token_of_a_node_may_be_for_several(gateway):
    made = (await command(gateway, "token", "create", "p", "--role=node", "--uses=2")).strip()
    for name in ("one", "two"):
        await gateway.enroll_node(name, made)
    assert "used" in (await failure(gateway.enroll_node("three", made))).message
    listed = json.loads(await command(gateway, "token", "list", "--format=json"))
    pool = next(row for row in listed if row["name"] == "p")
    assert (pool["uses"], pool["max_uses"], pool["state"]) == (2, 2, "used")
    assert pool["expires_at"] is not None


async def test_end_of_an_enrolment_token_is_not_the_end_of_its_node(gateway):
    made = (
        await command(gateway, "token", "create", "p", "--role=node", "--expires-in=4s")
    ).strip()
    keys = await gateway.enroll_node("one", made)
    await asyncio.sleep(4.1)
    assert "expired on" in (await failure(gateway.enroll_node("two", made))).message
    async with AttachedNode(gateway, "one", keys) as node:
        assert node.ended is None


async def certificates_of(server: NodeServer) -> set[bytes | None]:
    """Return the certificates that a node has stored, works with and shows to clients, DER."""
    stored = (server.config.data / "identity" / "cert.pem").read_text()
    used = server.credentials.keys.certificate_pem.decode()
    shown = await asyncio.to_thread(leaf_of, server.buildkit_port.address)
    return {ssl.PEM_cert_to_DER_cert(stored), ssl.PEM_cert_to_DER_cert(used), shown}


async def test_node_renews_its_certificate_while_it_builds(monkeypatch):
    monkeypatch.setattr(renewal, "LOOK_SECONDS", 0.3)
    async with NodePool(node_certificate_lifetime=4.0) as pool:
        await pool.start_node()
        server = pool._running["one"][0]
        first = server.credentials.keys
        assigned = await pool.assigned()
        client = RawClient(await pool.channel(assigned), assigned, "RUN echo begun; sleep 7\n")
        client.spec.outputs.add(type=Output.TYPE_IMAGE)
        await client.start()
        await client.until("result")
        await client.done()
        assert server.credentials.keys.certificate_pem != first.certificate_pem
        # It may renew in between any two looks: what it stores comes before what it shows.
        async with asyncio.timeout(SECONDS):
            while len(await certificates_of(server)) > 1:
                await asyncio.sleep(0.05)
        # The first certificate has ended; the node serves, and a new process needs no token.
        await asyncio.wait_for((await pool.channel(await pool.assigned())).channel_ready(), 5)
        await pool.stop_node("one")
        fresh = type(server)(server.config)
        async with fresh:
            assert fresh.agent.identity.node_id == "one"


async def test_wrong_tokens_are_limited_by_address_and_say_when_to_try_again():
    async with RunningGateway(login_failures=3) as gateway:
        good = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
        parts = good.split("_")
        wrong = "_".join([*parts[:2], "a" * 52, parts[3]])
        for _ in range(3):
            assert "does not know" in (await failure(gateway.login(wrong))).message
        for call in (gateway.login(wrong), gateway.login(good)):
            error = await failure(call)
            assert isinstance(error, QuotaExceededError)
            assert "127.0.0.1; try again in" in error.message
            assert 0 < error.retry_after_seconds <= 21
        stub = await gateway.enrollment()
        for request in (
            stub.DescribeLogin(identity_pb.DescribeLoginRequest(), metadata=call_metadata()),
            stub.Exchange(identity_pb.ExchangeRequest(token="a.b.c"), metadata=call_metadata()),
        ):
            assert isinstance(await failure(request), QuotaExceededError)
        limited = await records(gateway, "--action", "login")
        assert [row["result"] for row in limited].count("QUOTA_EXCEEDED") == 1


async def test_certificates_are_limited_by_token_of_who_has_proved_it():
    async with RunningGateway(token_certificates=4) as gateway:
        token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
        keys = await gateway.login(token)
        stub = IdentityServiceStub(await gateway.channel(keys))
        for _ in range(3):
            await stub.Renew(identity_pb.RenewRequest(), metadata=call_metadata())
        error = await failure(stub.Renew(identity_pb.RenewRequest(), metadata=call_metadata()))
        assert isinstance(error, QuotaExceededError)
        assert isinstance(await failure(gateway.login(token)), QuotaExceededError)
        bob = await gateway.create_token("bob", identity_pb.ROLE_MEMBER)
        await gateway.login(bob)


async def test_audit_log_says_who_did_what_from_where_and_never_a_secret(gateway):
    await gateway.create_project("shop")
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER, "shop")
    keys = await gateway.login(token)
    await failure(gateway.login(token.replace("_", "_a", 2)[: len(token)]))
    admin = AdminServiceStub(await gateway.channel(keys))
    refused = identity_pb.CreateTokenRequest(name="evil", role=identity_pb.ROLE_ADMIN)
    await failure(admin.CreateToken(refused, metadata=call_metadata()))
    async with AttachedNode(gateway, "one", await gateway.enroll_node("one")) as node:
        call = BuildsServiceStub(await gateway.channel(keys)).Create(
            builds_pb.CreateRequest(request_id="r", project_id="shop", name="web"),
            metadata=call_metadata(),
        )
        while not (message := await call.read()).HasField("assigned"):
            pass
        build_id = message.assigned.build_id
        node.update(build_id, builds_pb.BUILD_STATE_SUCCEEDED, secret_ids=["npm_token", "key\nx"])
        await eventually_ended(gateway)
    await command(gateway, "token", "revoke", token.split("_")[1])
    found = await records(gateway)
    seen = [(row["action"], row["member"], row["result"]) for row in found]
    for expected in (
        ("login", "admin", "ok"),
        ("project.created", "admin", "ok"),
        ("token.created", "admin", "ok"),
        ("login", "ann", "ok"),
        ("login", "", "UNAUTHENTICATED"),
        ("token.created", "ann", "FORBIDDEN"),
        ("node.enrolled", "one", "ok"),
        ("node.attached", "one", "ok"),
        ("build.created", "ann", "ok"),
        ("build.ended", "ann", "ok"),
    ):
        assert expected in seen, (expected, seen)
    local = next(row for row in found if row["action"] == "token.revoked")
    assert (local["role"], local["address"]) == ("operator", "local")
    ended = next(row for row in found if row["action"] == "build.ended")
    assert (ended["project_id"], ended["build_id"]) == ("shop", build_id)
    assert ended["secret_ids"] == ["npm_token", "key\N{REPLACEMENT CHARACTER}x"]
    assert {row["address"] for row in found} - {"local", ""} == {"127.0.0.1"}
    assert token.split("_")[2] not in json.dumps(found)
    assert {row["action"] for row in await records(gateway, "--project", "shop")} == {
        "project.created", "build.created", "build.ended",
    }  # fmt: skip
    assert {row["member"] for row in await records(gateway, "--member", "ann")} == {"ann"}
    assert await records(gateway, "--since", "2999-01-01") == []
    assert "build.created" in await command(gateway, "audit", "--action", "build")


async def test_records_of_the_audit_log_cannot_be_changed(gateway):
    await gateway.login()
    database = sqlite3.connect(gateway.directory / "gateway.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="not changed"):
        database.execute("UPDATE audit SET member = 'nobody'")
    database.close()
