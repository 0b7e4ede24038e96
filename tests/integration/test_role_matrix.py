"""Every RPC of every service against every role, at a real gateway and a real node with a build."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest

from offload_builder.gateway.ca import CertificateAuthority
from offload_core.tls import (
    ENROLL_NAME,
    GATEWAY_NAME,
    NODE_SUFFIX,
    Identity,
    KeyPair,
    open_channel,
)
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.rolematrix import AT_NODES, MATRIX, ROLES, answer, methods, request_of

if TYPE_CHECKING:
    from pathlib import Path

SLEEPS = "RUN echo begun; sleep 60\n"


class Cast:
    """A pool with somebody of every role, and a build of `member` that runs."""

    def __init__(self, pool: NodePool, scratch: Path) -> None:
        self.pool = pool
        self.scratch = scratch
        self.keys: dict[str, KeyPair | None] = {"none": None}
        self.tokens: dict[str, str] = {}
        self.client: RawClient
        self.waiting = ""

    async def enter(self) -> None:
        gateway = self.pool.gateway
        for project_id in ("shop", "other"):
            await gateway.create_project(project_id)
        self.keys["admin"] = await gateway.login()
        people = {
            "member": identity_pb.ROLE_MEMBER,
            "ci": identity_pb.ROLE_CI,
            "untrusted": identity_pb.ROLE_UNTRUSTED,
            "stranger": identity_pb.ROLE_MEMBER,
            "revoked": identity_pb.ROLE_MEMBER,
        }
        for name, role in people.items():
            project_id = "other" if name == "stranger" else "shop"
            self.tokens[name] = await gateway.create_token(name, role, project_id)
            self.keys[name] = await gateway.login(self.tokens[name])
        self.keys["node"] = await gateway.enroll_node("two")
        forged = Identity("member", "member", self.tokens["member"].split("_")[1], "admin")
        other = CertificateAuthority.open(self.scratch / "other")
        self.keys["other_ca"], _ = other.issue_member(forged, datetime.now(UTC) + timedelta(days=1))
        await self.pool.start_node(slots=1, drain_timeout=0.1)
        assigned = await self.pool.assigned(self.keys["member"], project_id="shop")
        channel = await self.pool.channel(assigned, self.keys["member"])
        self.client = RawClient(channel, assigned, SLEEPS)
        await self.client.start()
        await self.client.until_text(b"begun")
        self.waiting = await self.queued("ci")
        await self.revoke("revoked")

    async def queued(self, role: str) -> str:
        """Return a build that waits."""
        stub = BuildsServiceStub(await self.pool.gateway.channel(self.keys[role]))
        call = stub.Create(
            builds_pb.CreateRequest(request_id="waits", project_id="shop"),
            metadata=call_metadata(),
        )
        message = await call.read()
        return str(message.queued.build_id)

    async def revoke(self, role: str) -> None:
        """Revoke a token and wait until the node knows."""
        token_id = self.tokens[role].split("_")[1]
        await (await self.pool.gateway.admin()).RevokeToken(
            identity_pb.RevokeTokenRequest(token_id=token_id), metadata=call_metadata(), timeout=10
        )
        revocations = self.pool._running["one"][0].revocations
        async with asyncio.timeout(10):
            while token_id not in revocations:
                await asyncio.sleep(0.01)

    async def answer_of(self, name: str, role: str) -> str:
        """Call a method as somebody."""
        method, entry = methods()[name], MATRIX[name]
        build_id = self.client.assigned.build_id
        request = request_of(method, entry.request, BUILD=build_id, WAITING=self.waiting)
        service = name.partition("/")[0]
        if service in AT_NODES:
            target = self.client.assigned.endpoints[0], "one" + NODE_SUFFIX
        else:
            enrols = service == "EnrollmentService"
            target = self.pool.gateway.address, ENROLL_NAME if enrols else GATEWAY_NAME
        async with open_channel(
            *target, ca_pem=self.pool.gateway.ca_pem, keys=self.keys[role]
        ) as channel:
            return await answer(channel, method, request, build_id)


@pytest.fixture
async def cast(tmp_path):
    async with NodePool(login_failures=0) as pool:
        made = Cast(pool, tmp_path)
        await made.enter()
        yield made


def test_every_rpc_has_an_entry():
    assert sorted(set(methods()) - set(MATRIX)) == []
    assert all(set(entry.expected()) == set(ROLES) for entry in MATRIX.values())


@pytest.mark.timeout(200)
async def test_every_rpc_answers_every_role_as_it_should(cast):
    wrong = {}
    for name in methods():
        expected = MATRIX[name].expected()
        found = {role: await cast.answer_of(name, role) for role in ROLES}
        wrong |= {
            f"{name} as {role}": f"{found[role]}, not {expected[role]}"
            for role in ROLES
            if found[role] != expected[role]
        }
    assert wrong == {}, "\n".join(f"{key}: {value}" for key, value in wrong.items())


async def refusal(call) -> tuple[str, str]:
    """Return code and sentence of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


@pytest.mark.timeout(120)
async def test_nothing_of_one_project_opens_anything_for_a_member_of_another(cast):
    keys, build_id = cast.keys["stranger"], cast.client.assigned.build_id
    builds = BuildsServiceStub(await cast.pool.gateway.channel(keys))
    options = {"metadata": call_metadata(), "timeout": 10}

    # Build ids: a build of another project is answered as one that does not exist, word by word.
    for method, request in (
        (builds.Get, builds_pb.GetRequest),
        (builds.Cancel, builds_pb.CancelRequest),
        (builds.Locate, builds_pb.LocateRequest),
    ):
        for name in (build_id, build_id[:6]):
            theirs = await refusal(method(request(build_id=name), **options))
            unknown = "z" * len(name)
            nobody = await refusal(method(request(build_id=unknown), **options))
            assert theirs[0] == nobody[0] == "NOT_FOUND"
            assert theirs[1].replace(name, "X") == nobody[1].replace(unknown, "X")
    listed = await builds.List(builds_pb.ListRequest(), **options)
    assert [build.project_id for build in listed.builds if build.project_id != "other"] == []

    # Projects: those that are there and those that are not are refused alike.
    for name in ("shop", "none"):
        code, sentence = await refusal(
            builds.PlanPlatforms(builds_pb.PlanPlatformsRequest(project_id=name), **options)
        )
        assert code == "PERMISSION_DENIED"
        assert sentence.replace(name, "X") == '"stranger" may not use the project "X", only other'

    # Tickets: of another member, also when it is new; and one's own for another build.
    member = BuildsServiceStub(await cast.pool.gateway.channel(cast.keys["member"]))
    for name in (cast.waiting, build_id):
        await member.Cancel(builds_pb.CancelRequest(build_id=name), **options)
    await cast.pool.wait_state(build_id, builds_pb.BUILD_STATE_CANCELED)
    fresh = await cast.pool.assigned(cast.keys["member"], project_id="shop")
    stolen = RawClient(await cast.pool.channel(fresh, keys), fresh)
    await stolen.start()
    async with asyncio.timeout(10):
        code, sentence = await refusal(stolen.call.read())
    assert (code, sentence) == ("PERMISSION_DENIED", "the build ticket belongs to another member")
    changed = builds_pb.Assigned()
    changed.CopyFrom(fresh)
    ticket = builds_pb.Ticket.FromString(changed.ticket.payload)
    ticket.member = "stranger"
    changed.ticket.payload = ticket.SerializeToString()
    forged = RawClient(await cast.pool.channel(fresh, keys), changed)
    await forged.start()
    async with asyncio.timeout(10):
        code, sentence = await refusal(forged.call.read())
    assert (code, "not signed" in sentence) == ("PERMISSION_DENIED", True)

    # Repeats: a lost build of another project is not taken up.
    request = builds_pb.CreateRequest(request_id="again", project_id="other", repeat_of=build_id)
    call = builds.Create(request, metadata=call_metadata())
    message = await call.read()
    state = message.assigned if message.HasField("assigned") else message.queued
    mine = await builds.Get(builds_pb.GetRequest(build_id=state.build_id), **options)
    call.cancel()
    assert (mine.build.project_id, mine.build.repeat_of) == ("other", "")
