"""Who gets in: tokens, certificates, roles and versions at a real gateway."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import click
import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509

from offload_builder.cli import project as project_command
from offload_builder.cli import token as token_command
from offload_builder.cli.errors import ErrorGroup
from offload_builder.gateway.ca import CertificateAuthority
from offload_core.errors import (
    AccessDeniedError,
    AuthenticationError,
    GatewayUnreachableError,
    UsageError,
    VersionError,
)
from offload_core.tls import GATEWAY_NAME, Identity, KeyPair, open_channel
from offload_core.trust import fetch_pinned_ca
from offload_core.versions import VERSION_KEY, call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.identity_service_pb2_grpc import AdminServiceStub, IdentityServiceStub
from tests.fixtures.gateway import RunningGateway, failure
from tests.integration.attachednode import AttachedNode

SECONDS = 10.0


@pytest.fixture
async def gateway():
    async with RunningGateway() as running:
        yield running


async def login_failure(gateway: RunningGateway, token: str):
    stub = await gateway.enrollment()
    return await failure(
        stub.Login(identity_pb.LoginRequest(token=token), timeout=SECONDS, metadata=call_metadata())
    )


async def who_am_i(gateway: RunningGateway, keys: KeyPair | None, metadata=None):
    stub = IdentityServiceStub(await gateway.channel(keys))
    return stub.WhoAmI(
        identity_pb.WhoAmIRequest(),
        timeout=SECONDS,
        metadata=call_metadata() if metadata is None else metadata,
    )


def is_refused_by_tls(error) -> bool:
    return isinstance(error, GatewayUnreachableError)


async def test_token_gives_a_certificate_that_names_the_member(gateway):
    reply = await (await who_am_i(gateway, await gateway.login()))
    assert (reply.member, reply.role) == ("admin", identity_pb.ROLE_ADMIN)
    assert list(reply.project_ids) == []


async def test_first_contact_needs_only_the_token(gateway):
    assert await fetch_pinned_ca(gateway.address, gateway.admin_token) == gateway.ca_pem


async def test_first_token_is_shown_once(gateway):
    assert gateway.admin_token.startswith("ofl_")
    assert gateway.gateway.take_first_token() is None


async def test_wrong_token_is_refused(gateway):
    parts = gateway.admin_token.split("_")
    parts[2] = "a" * 52
    error = await login_failure(gateway, "_".join(parts))
    assert isinstance(error, AuthenticationError)
    assert error.hint


async def test_rubbish_is_refused(gateway):
    assert isinstance(await login_failure(gateway, "hunter2"), AuthenticationError)


async def test_expired_token_is_refused_at_login_and_behind_its_certificate(gateway):
    admin = await gateway.admin()
    request = identity_pb.CreateTokenRequest(name="ann", role=identity_pb.ROLE_MEMBER)
    request.expires_at.FromDatetime(datetime.now(UTC) + timedelta(seconds=2.5))
    made = await admin.CreateToken(request, timeout=SECONDS, metadata=call_metadata())
    keys = await gateway.login(made.secret)
    leaf = x509.load_pem_x509_certificate(keys.certificate_pem)
    assert leaf.not_valid_after_utc <= request.expires_at.ToDatetime(tzinfo=UTC)
    channel = IdentityServiceStub(await gateway.channel(keys))
    await channel.WhoAmI(identity_pb.WhoAmIRequest(), timeout=SECONDS, metadata=call_metadata())
    await asyncio.sleep(2.6)
    error = await failure(
        channel.WhoAmI(identity_pb.WhoAmIRequest(), timeout=SECONDS, metadata=call_metadata())
    )
    assert "expired on" in error.message
    assert "expired on" in (await login_failure(gateway, made.secret)).message


async def test_revoked_token_ends_its_certificates_nodes_and_places_at_once(gateway):
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
    keys = await gateway.login(token)
    builds = BuildsServiceStub(await gateway.channel(keys))
    waiting = builds.Create(
        builds_pb.CreateRequest(request_id="r", project_id="default"), metadata=call_metadata()
    )
    assert (await waiting.read()).HasField("queued")
    admin = await gateway.admin()
    node_token = await gateway.create_token("pool", identity_pb.ROLE_NODE)
    async with AttachedNode(
        gateway, "node-1", await gateway.enroll_node("node-1", node_token), accepts=False
    ) as node:
        for text in (token, node_token):
            request = identity_pb.RevokeTokenRequest(token_id=text.split("_")[1])
            await admin.RevokeToken(request, timeout=SECONDS, metadata=call_metadata())
        await node.eventually(lambda: node.ended is not None)
        assert node.ended.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await waiting.read():
            pass
    assert "was revoked" in caught.value.details()
    error = await failure(await who_am_i(gateway, keys))
    assert isinstance(error, AuthenticationError)
    assert "was revoked" in error.message
    assert "was revoked" in (await login_failure(gateway, token)).message


async def test_call_without_a_certificate_is_refused(gateway):
    assert is_refused_by_tls(await failure(await who_am_i(gateway, None)))


async def test_certificate_of_another_ca_is_refused(gateway, tmp_path):
    other = CertificateAuthority.open(tmp_path)
    identity = Identity("member", "admin", gateway.admin_token.split("_")[1], "admin")
    keys, _ = other.issue_member(identity, datetime.now(UTC) + timedelta(days=1))
    assert is_refused_by_tls(await failure(await who_am_i(gateway, keys)))


async def test_client_does_not_trust_a_gateway_of_another_ca(gateway, tmp_path):
    other = CertificateAuthority.open(tmp_path)
    keys = await gateway.login()
    async with open_channel(
        gateway.address, GATEWAY_NAME, ca_pem=other.ca_pem, keys=keys
    ) as channel:
        call = IdentityServiceStub(channel).WhoAmI(
            identity_pb.WhoAmIRequest(), timeout=SECONDS, metadata=call_metadata()
        )
        error = await failure(call)
        assert isinstance(error, AuthenticationError)
        assert "not from the authority of your login" in str(error)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [((), "too old"), (((VERSION_KEY, "99"),), "newer"), (((VERSION_KEY, "x"),), "too old")],
)
async def test_other_protocol_version_is_refused(gateway, metadata, words):
    error = await failure(await who_am_i(gateway, await gateway.login(), metadata))
    assert isinstance(error, VersionError)
    assert words in error.message


async def test_renewed_certificate_works(gateway):
    keys = await gateway.login()
    stub = IdentityServiceStub(await gateway.channel(keys))
    reply = await stub.Renew(identity_pb.RenewRequest(), timeout=SECONDS, metadata=call_metadata())
    fresh = KeyPair(
        reply.certificate.certificate_pem,
        reply.certificate.private_key_pem,
        reply.certificate.ca_pem,
    )
    assert fresh.certificate_pem != keys.certificate_pem
    assert (await (await who_am_i(gateway, fresh))).member == "admin"


async def test_members_may_not_administrate(gateway):
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
    stub = AdminServiceStub(await gateway.channel(await gateway.login(token)))
    calls = {
        "CreateToken": identity_pb.CreateTokenRequest(name="x", role=identity_pb.ROLE_ADMIN),
        "ListTokens": identity_pb.ListTokensRequest(),
        "RevokeToken": identity_pb.RevokeTokenRequest(token_id="x"),
        "CreateProject": identity_pb.CreateProjectRequest(project_id="x"),
    }
    for method, request in calls.items():
        call = getattr(stub, method)(request, timeout=SECONDS, metadata=call_metadata())
        assert isinstance(await failure(call), AccessDeniedError)


async def test_tokens_are_listed_without_secrets(gateway):
    token = await gateway.create_token("ann", identity_pb.ROLE_CI, "default")
    listed = await (await gateway.admin()).ListTokens(
        identity_pb.ListTokensRequest(), timeout=SECONDS, metadata=call_metadata()
    )
    assert [entry.name for entry in listed.tokens] == ["ann", "admin"]
    assert listed.tokens[0].role == identity_pb.ROLE_CI
    assert listed.tokens[1].HasField("last_used_at")
    assert token.split("_")[2].encode() not in listed.SerializeToString()


async def test_projects_are_listed_as_far_as_they_may_be_used(gateway):
    await gateway.create_project("shop")
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER, "shop")
    stub = AdminServiceStub(await gateway.channel(await gateway.login(token)))
    listed = await stub.ListProjects(
        identity_pb.ListProjectsRequest(), timeout=SECONDS, metadata=call_metadata()
    )
    assert [entry.project_id for entry in listed.projects] == ["shop"]
    error = await failure(
        (await gateway.admin()).CreateProject(
            identity_pb.CreateProjectRequest(project_id="shop"),
            timeout=SECONDS,
            metadata=call_metadata(),
        )
    )
    assert isinstance(error, UsageError)


async def test_node_token_does_not_log_in_and_member_token_enrols_no_node(gateway):
    node = await gateway.create_token("pool", identity_pb.ROLE_NODE)
    assert isinstance(await login_failure(gateway, node), AccessDeniedError)
    member = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
    assert isinstance(await failure(gateway.enroll_node("node-1", member)), AccessDeniedError)


async def test_node_certificate_is_no_members_and_the_other_way_round(gateway):
    keys = await gateway.enroll_node("node-1")
    assert isinstance(await failure(await who_am_i(gateway, keys)), AccessDeniedError)
    async with AttachedNode(gateway, "node-1", await gateway.login()) as node:
        assert node.ended.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_name_of_an_attached_node_is_taken_for_other_tokens(gateway):
    async with AttachedNode(gateway, "node-1", await gateway.enroll_node("node-1")):
        other = await gateway.create_token("elsewhere", identity_pb.ROLE_NODE)
        error = await failure(gateway.enroll_node("node-1", other))
        assert isinstance(error, AccessDeniedError)
        assert "in use" in error.message


def commands() -> ErrorGroup:
    @click.group(cls=ErrorGroup)
    def root() -> None:
        """Stand in for the program."""

    token_command.register(root)
    project_command.register(root)
    return root


def run(*arguments: str):
    return CliRunner().invoke(commands(), list(arguments))


async def test_commands_work_beside_a_running_gateway(gateway):
    data = ["--data-dir", str(gateway.directory)]

    async def command(*arguments: str):
        return await asyncio.to_thread(run, *arguments, *data)

    assert (await command("project", "create", "shop")).stdout == "shop\n"
    made = await command("token", "create", "ann", "--project", "shop", "--expires-in", "1d")
    assert made.exit_code == 0, made.stderr
    reply = await (await who_am_i(gateway, await gateway.login(made.stdout.strip())))
    assert list(reply.project_ids) == ["shop"]
    listed = json.loads((await command("token", "list", "--format", "json")).stdout)
    assert [(row["name"], row["state"]) for row in listed] == [("ann", "valid"), ("admin", "valid")]
    keys = await gateway.login(made.stdout.strip())
    assert (await command("token", "revoke", listed[0]["token_id"])).exit_code == 0
    assert "was revoked" in (await failure(await who_am_i(gateway, keys))).message
    assert "revoked" in (await command("token", "list")).stdout
    projects = (await command("project", "list")).stdout
    assert projects.startswith("PROJECT ID")
    assert "shop" in projects


def test_command_errors_are_a_sentence_and_an_exit_code(tmp_path):
    result = run("token", "create", "ann", "--project", "nope", "--data-dir", str(tmp_path))
    assert result.exit_code == 5
    assert result.stdout == ""
    assert result.stderr.startswith('ERROR: there is no project "nope"')
    result = run("project", "create", "No!", "--data-dir", str(tmp_path))
    assert result.exit_code == UsageError.exit_code


async def test_token_made_before_the_first_start_does_not_replace_the_administrator():
    running = RunningGateway()
    made = await asyncio.to_thread(
        run, "token", "create", "pool", "--role", "node", "--data-dir", str(running.directory)
    )
    assert made.exit_code == 0, made.stderr
    async with running as gateway:
        assert (await (await who_am_i(gateway, await gateway.login()))).member == "admin"
        await gateway.enroll_node("node-1", made.stdout.strip())
