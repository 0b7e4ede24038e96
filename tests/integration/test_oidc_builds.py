"""What a login by an identity provider is worth: builds, tickets, history, scopes, its end."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from offload_builder.cli import identity as identity_command
from offload_builder.cli.errors import ErrorGroup
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceStub
from tests.fixtures.gateway import failure
from tests.fixtures.oidcgateway import OidcGateway, keys_of
from tests.integration.attachednode import AttachedNode

SECONDS = 10.0
RUN = {"ref": "refs/heads/fix", "ref_protected": False, "run_url": "https://ci.example/run/1"}


@pytest.fixture
async def pool():
    async with OidcGateway(protected_branches=("main",)) as running:
        yield running


async def placed(pool, reply, **request):
    """Build, return the ticket."""
    stub = BuildsServiceStub(await pool.gateway.channel(keys_of(reply)))
    fields = {"request_id": "r", "project_id": "default", **request}
    async with AttachedNode(pool.gateway, "node-1", await pool.gateway.enroll_node("node-1")):
        call = stub.Create(builds_pb.CreateRequest(**fields), metadata=call_metadata())
        async for update in call:
            if update.HasField("assigned"):
                ticket = builds_pb.Ticket.FromString(update.assigned.ticket.payload)
                build = await stub.Get(
                    builds_pb.GetRequest(build_id=ticket.build_id), metadata=call_metadata()
                )
                return ticket, build.build
    raise AssertionError("the build was not placed")


async def test_identity_stands_in_whoami_the_ticket_and_the_history(pool):
    reply = await pool.exchange(pool.provider.token(**RUN))
    me = await (await pool.identity_stub(reply)).WhoAmI(
        identity_pb.WhoAmIRequest(), metadata=call_metadata()
    )
    ticket, build = await placed(pool, reply)
    for told in (me.identity, ticket.identity, build.identity):
        assert told.issuer == pool.provider.url
        assert (told.subject, told.run_url) == ("project:app", "https://ci.example/run/1")
        assert (told.rule, told.branch) == ("project app", "fix")
    assert build.member == ticket.member == me.member


async def test_proven_branch_holds_whatever_the_client_says(pool):
    reply = await pool.exchange(pool.provider.token(**RUN))
    ticket, build = await placed(pool, reply, vcs_branch="main")
    assert ticket.write_scope == "default/fix"
    assert build.vcs_branch == ticket.vcs_branch == "fix"


async def test_proven_branch_holds_for_builds_that_a_node_brings(pool):
    reply = await pool.exchange(pool.provider.token(**RUN))
    der = x509.load_pem_x509_certificate(keys_of(reply).certificate_pem).public_bytes(Encoding.DER)
    node_keys = await pool.gateway.enroll_node("node-1")
    wish = builds_pb.CreateRequest(
        request_id="r", project_id="default", client="buildx", vcs_branch="main"
    )
    async with AttachedNode(pool.gateway, "node-1", node_keys):
        stub = NodesServiceStub(await pool.gateway.channel(node_keys))
        call = stub.Admit(
            nodes_pb.AdmitRequest(certificate_der=der, build=wish), metadata=call_metadata()
        )
        async for update in call:
            if update.HasField("assigned"):
                ticket = builds_pb.Ticket.FromString(update.assigned.ticket.payload)
                assert (ticket.vcs_branch, ticket.write_scope) == ("fix", "default/fix")
                assert ticket.identity.branch == "fix"
                return
    raise AssertionError("the build was not placed")


async def test_run_on_the_protected_branch_writes_it(pool):
    reply = await pool.exchange(pool.provider.token(ref="refs/heads/main", ref_protected=True))
    ticket, _ = await placed(pool, reply)
    assert (ticket.write_scope, ticket.trust_domain) == ("default/main", "protected")


async def test_fork_that_claims_the_protected_branch_writes_its_own_scope(pool):
    reply = await pool.exchange(
        pool.provider.token(ref="refs/heads/main", ref_protected=True, fork=True)
    )
    assert reply.role == identity_pb.ROLE_UNTRUSTED
    ticket, _ = await placed(pool, reply, vcs_branch="main")
    assert ticket.write_scope == f"default/~untrusted-{reply.member.replace('+', '%2B')}"
    stub = BuildsServiceStub(await pool.gateway.channel(keys_of(reply)))
    for request in (
        {"project_id": "other"},
        {"project_id": "default", "cache": builds_pb.CacheChoice(read_scopes=["~untrusted-x"])},
    ):
        call = stub.Create(
            builds_pb.CreateRequest(request_id="x", **request), metadata=call_metadata()
        )
        assert (await failure(call.read())).message


async def test_certificate_is_short_and_is_not_renewed_without_a_token():
    async with OidcGateway(further='certificate_lifetime = "10m"') as pool:
        reply = await pool.exchange(pool.provider.token())
        leaf = x509.load_pem_x509_certificate(reply.certificate.certificate_pem)
        assert leaf.not_valid_after_utc <= datetime.now(UTC) + timedelta(minutes=10)
        stub = await pool.identity_stub(reply)
        error = await failure(stub.Renew(identity_pb.RenewRequest(), metadata=call_metadata()))
        assert "fresh token" in error.message


async def test_login_ends_with_its_lifetime_on_open_connections_too():
    import asyncio

    async with OidcGateway(further='certificate_lifetime = "2s"') as pool:
        reply = await pool.exchange(pool.provider.token())
        stub = await pool.identity_stub(reply)
        await stub.WhoAmI(identity_pb.WhoAmIRequest(), metadata=call_metadata())
        await asyncio.sleep(2.1)
        error = await failure(stub.WhoAmI(identity_pb.WhoAmIRequest(), metadata=call_metadata()))
        assert "expired" in error.message


async def test_project_that_does_not_exist_is_named():
    from tests.fixtures.oidcgateway import RULES

    async with OidcGateway(rules=RULES.replace('["default"]', '["ghost"]')) as pool:
        error = await pool.refusal(pool.provider.token())
        assert 'the project "ghost", which does not exist' in error.message


async def test_description_of_logins_has_what_clients_need(pool):
    stub = await pool.gateway.enrollment()
    told = await stub.DescribeLogin(
        identity_pb.DescribeLoginRequest(), timeout=SECONDS, metadata=call_metadata()
    )
    assert (told.audience, list(told.issuers)) == ("offload.test", [pool.provider.url])
    assert not told.HasField("person")


def identity(pool, *arguments, text=None):
    group = ErrorGroup("main")
    identity_command.register(group)
    words = ["identity", *arguments, "--data-dir", str(pool.gateway.directory)]
    return CliRunner().invoke(group, words, input=text)


async def test_dry_run_says_which_rule_matches_and_what_results(pool, tmp_path):
    path = tmp_path / "claims.json"
    path.write_text(json.dumps(pool.provider.claims(**RUN)))
    shown = identity(pool, "test", "--claims", str(path))
    assert shown.exit_code == 0
    assert 'Matches "project app"' in shown.output
    assert "PROJECT/fix" in shown.output
    told = json.loads(identity(pool, "test", "--claims", str(path), "--format", "json").output)
    assert (told["rule"], told["role"], told["branch"]) == ("project app", "ci", "fix")
    path.write_text(json.dumps(pool.provider.claims(sub="project:other")))
    refused = identity(pool, "test", "--claims", str(path))
    assert refused.exit_code == 4
    assert 'sub is "project:other", not "project:app"' in refused.output
    assert len(await pool.gateway.gateway._members.external.list()) == 0


async def test_dry_run_of_a_token_verifies_it(pool, tmp_path):
    import asyncio

    path = tmp_path / "token"
    path.write_text(pool.provider.token(**RUN))
    shown = await asyncio.to_thread(identity, pool, "test", "--token", str(path))
    assert shown.exit_code == 0, shown.output
    path.write_text(pool.provider.token(**RUN)[:-8] + "AAAAAAAA")
    shown = await asyncio.to_thread(identity, pool, "test", "--token", str(path))
    assert shown.exit_code == 4
    assert "signature" in shown.output


async def test_rules_and_logins_are_listed(pool):
    import asyncio

    await pool.exchange(pool.provider.token(**RUN))
    shown = identity(pool, "show")
    assert "project app" in shown.output
    assert pool.gateway.admin_token.rpartition("_")[2] in shown.output
    shown = await asyncio.to_thread(identity, pool, "logins")
    assert "https://ci.example/run/1" in shown.output


async def test_wrong_rules_are_named_with_their_line(pool):
    (pool.gateway.directory / "identity.toml").write_text('audience = "x"\ncolour = 1\n')
    shown = identity(pool, "show")
    assert shown.exit_code == 3
    assert "identity.toml, line 2: unknown key" in shown.output
