"""A gateway over real sockets: admission, nodes and history."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from offload_core.errors import (
    AccessDeniedError,
    BuildCanceledError,
    GatewayUnreachableError,
    NotFoundError,
    OffloadError,
    QueueTimeoutError,
    QuotaExceededError,
    UsageError,
)
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from tests.fixtures.gateway import RunningGateway
from tests.integration.attachednode import AttachedNode

QUEUED, RUNNING = builds_pb.BUILD_STATE_QUEUED, builds_pb.BUILD_STATE_RUNNING
SUCCEEDED, FAILED = builds_pb.BUILD_STATE_SUCCEEDED, builds_pb.BUILD_STATE_FAILED
CANCELED, LOST = builds_pb.BUILD_STATE_CANCELED, builds_pb.BUILD_STATE_LOST
RPC_SECONDS = 10.0


def domain_error(error: grpc.RpcError) -> OffloadError:
    return error_from_rpc(error, peer="the gateway", unreachable=GatewayUnreachableError)


async def assignment(stream: Any) -> builds_pb.Assigned:
    """Read queue updates until the build is placed."""
    while not (update := await stream.read()).HasField("assigned"):
        pass
    return update.assigned


class Client:
    """What a member's command does."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    def create(self, **values: Any) -> Any:
        defaults = {"request_id": uuid.uuid4().hex, "project_id": "default"}
        request = builds_pb.CreateRequest(**defaults | values)
        return self.stub.Create(request, timeout=30, metadata=call_metadata())

    async def assigned(self, **values: Any) -> builds_pb.Assigned:
        return await assignment(self.create(**values))

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self.stub, method)(
                request, timeout=RPC_SECONDS, metadata=call_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise domain_error(error) from error

    async def build(self, build_id: str) -> builds_pb.Build:
        return (await self.call("Get", builds_pb.GetRequest(build_id=build_id))).build

    async def until(self, build_id: str, state: int, seconds: float = 5.0) -> builds_pb.Build:
        async with asyncio.timeout(seconds):
            while (build := await self.build(build_id)).state != state:
                await asyncio.sleep(0.02)
        return build

    async def logs(self, build_id: str, *, after: int = 0, follow: bool = False) -> list[int]:
        request = builds_pb.LogsRequest(build_id=build_id, resume_after=after, follow=follow)
        stream = self.stub.Logs(request, timeout=RPC_SECONDS, metadata=call_metadata())
        return [batch.sequence async for response in stream for batch in response.batches]


@pytest.fixture
async def gateway():
    async with RunningGateway() as running:
        yield running


async def client_of(gateway: RunningGateway, token: str = "") -> Client:
    return Client(BuildsServiceStub(await gateway.channel(await gateway.login(token))))


@pytest.fixture
async def client(gateway):
    return await client_of(gateway)


async def node_of(gateway: RunningGateway, node_id: str = "node-1", **options: Any):
    return AttachedNode(gateway, node_id, await gateway.enroll_node(node_id), **options)


async def test_free_node_gets_the_build_with_a_ticket_that_it_can_verify(gateway, client):
    options = {"endpoints": ["10.0.0.1:7444"], "relay_endpoint": "127.0.0.1:1"}
    async with await node_of(gateway, **options) as node:
        assigned = await client.assigned(vcs_branch="main")
        key = load_pem_public_key(node.welcome.ticket_public_key_pem)
    signed = assigned.ticket
    key.verify(signed.signature, b"offload.v1.Ticket\n" + signed.payload)
    ticket = builds_pb.Ticket.FromString(signed.payload)
    assert (ticket.build_id, ticket.node_id) == (assigned.build_id, "node-1")
    assert (ticket.project_id, ticket.member) == ("default", "admin")
    assert ticket.write_scope == "default/main"
    assert ticket.expires_at.seconds > time.time()
    assert assigned.server_name == "node-1.node.offload"
    assert list(assigned.endpoints) == ["10.0.0.1:7444", gateway.address]


async def test_wish_for_the_cache_is_kept_over_a_restart_and_refused_before_the_queue(
    gateway, client
):
    choice = builds_pb.CacheChoice(scope="nightly", read_scopes=["base"])
    stream = client.create(
        request_id="r", vcs_branch="topic", vcs_target_branch="main", cache=choice
    )
    await stream.read()
    bad = client.create(cache=builds_pb.CacheChoice(scope="~team"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bad.read()
    assert isinstance(domain_error(caught.value), UsageError)
    await gateway.stop()
    await gateway.start()
    again = await client_of(gateway)
    async with await node_of(gateway):
        assigned = await again.assigned(request_id="r")
    ticket = builds_pb.Ticket.FromString(assigned.ticket.payload)
    assert list(ticket.read_scopes) == [
        f"default/{name}" for name in ("base", "nightly", "main", "master", "~team")
    ]
    assert (ticket.write_scope, ticket.vcs_branch) == ("default/nightly", "topic")
    assert (ticket.role, ticket.trust_domain) == ("admin", "")


async def test_wish_that_new_rules_forbid_ends_the_build_and_frees_its_slot(gateway, client):
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER)
    ann = await client_of(gateway, token)
    await ann.create(request_id="r", cache=builds_pb.CacheChoice(scope="main")).read()
    await gateway.stop()
    gateway.options["protected_branches"] = ("main",)
    await gateway.start()
    ann = await client_of(gateway, token)
    async with await node_of(gateway) as node:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ann.assigned(request_id="r", cache=builds_pb.CacheChoice(scope="topic"))
        assert isinstance(domain_error(caught.value), AccessDeniedError)
        await node.eventually(lambda: len(node.cancelled) == 1)
        await ann.until(next(iter(node.cancelled)), CANCELED)


async def test_build_waits_with_place_and_reason_until_a_node_comes(gateway, client):
    stream = client.create()
    first = await stream.read()
    assert (first.queued.position, first.queued.reason) == (1, "no node is attached")
    async with await node_of(gateway):
        last = await assignment(stream)
    assert last.build_id == first.queued.build_id
    build = await client.until(first.queued.build_id, RUNNING)
    assert build.node_id == "node-1"
    assert build.started_at.seconds


async def test_build_of_another_project_is_nowhere(gateway, client):
    await gateway.create_project("shop")
    token = await gateway.create_token("eve", identity_pb.ROLE_MEMBER, "shop")
    eve = await client_of(gateway, token)
    async with await node_of(gateway):
        build_id = (await client.assigned()).build_id
        for wanted in (build_id, build_id[:6]):
            for method, request in (
                ("Locate", builds_pb.LocateRequest(build_id=wanted)),
                ("Get", builds_pb.GetRequest(build_id=wanted)),
                ("Cancel", builds_pb.CancelRequest(build_id=wanted)),
            ):
                with pytest.raises(NotFoundError):
                    await eve.call(method, request)
        found = await client.call("Locate", builds_pb.LocateRequest(build_id=build_id))
        assert found.build.build_id == build_id


async def test_names_of_a_build_steer_nobodys_terminal(gateway, client):
    async with await node_of(gateway) as node:
        names = {"name": "x\x1b]0;y\x07", "target": "a\nb", "dockerfile_path": "\u202ed"}
        assigned = await client.assigned(**names)
        node.update(assigned.build_id, FAILED, error="one\n\x1b[2Jtwo")
        build = await client.until(assigned.build_id, FAILED)
    shown = (build.name, build.target, build.dockerfile_path)
    assert shown == ("x\ufffd]0;y\ufffd", "a\ufffdb", "\ufffdd")
    assert build.error == "one\n\ufffd[2Jtwo"


async def test_builds_move_up_when_one_ends(gateway, client):
    async with await node_of(gateway) as node:
        running = await client.assigned()
        node.update(running.build_id, RUNNING)
        second, third = client.create(), None
        assert (await second.read()).queued.reason == "the only node is busy"
        third = client.create()
        assert (await third.read()).queued.position == 2
        node.update(running.build_id, SUCCEEDED)
        assert (await second.read()).HasField("assigned")
        assert (await third.read()).queued.position == 1
        third.cancel()


async def test_projects_take_turns(gateway, client):
    await gateway.create_project("other")
    async with await node_of(gateway) as node:
        running = await client.assigned()
        streams = []
        for project in ("default", "default", "other"):
            streams.append(client.create(project_id=project))
            await streams[-1].read()
        node.update(running.build_id, SUCCEEDED)
        # The project that has not yet had a turn comes first.
        assert (await streams[2].read()).HasField("assigned")
        for stream in streams:
            stream.cancel()


async def test_declined_build_goes_to_the_next_node(gateway, client):
    async with (
        await node_of(gateway, "node-1", accepts=False) as first,
        await node_of(gateway, "node-2", accepts=False) as second,
    ):
        stream = client.create()
        reason = (await stream.read()).queued.reason
        assert reason.endswith("declined: the disk is full")
        assert first.offers
        assert second.offers
        second.accepts = True
        assert (await assignment(stream)).node_id == "node-2"


async def test_node_that_does_not_answer_is_passed_over_and_gives_a_late_slot_back():
    async with RunningGateway(offer_timeout=0.2) as gateway:
        client = await client_of(gateway)
        async with await node_of(gateway, answers=False) as node:
            stream = client.create()
            queued = (await stream.read()).queued
            assert queued.reason.startswith("node node-1 declined: it did not answer")
            stream.cancel()
            await asyncio.sleep(0.3)
            node.reply(queued.build_id, accepted=True)
            await node.eventually(lambda: queued.build_id in node.cancelled)


async def test_platform_that_no_node_builds_does_not_hold_back_others(gateway, client):
    async with await node_of(gateway):
        waiting = client.create(platforms=["linux/arm64"])
        assert (await waiting.read()).queued.reason == "no node builds linux/arm64"
        assert (await client.assigned(platforms=["linux/amd64"])).node_id == "node-1"
        waiting.cancel()


async def test_repeated_request_is_the_same_build(gateway, client):
    first, second = (client.create(request_id="same") for _ in range(2))
    ids = {(await stream.read()).queued.build_id for stream in (first, second)}
    assert len(ids) == 1
    async with await node_of(gateway):
        assert (await first.read()).assigned.build_id in ids
        again = await client.assigned(request_id="same")
    assert again.build_id in ids


async def test_request_of_an_ended_build_is_refused(gateway, client):
    async with await node_of(gateway) as node:
        assigned = await client.assigned(request_id="same")
        node.update(assigned.build_id, SUCCEEDED)
        await client.until(assigned.build_id, SUCCEEDED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.assigned(request_id="same")
    error = domain_error(caught.value)
    assert isinstance(error, UsageError)
    assert assigned.build_id in error.message


async def test_client_that_leaves_the_queue_takes_its_build_out():
    async with RunningGateway(client_grace=0.2) as gateway:
        client = await client_of(gateway)
        leaving = client.create()
        build_id = (await leaving.read()).queued.build_id
        staying = client.create()
        assert (await staying.read()).queued.position == 2
        leaving.cancel()
        assert (await staying.read()).queued.position == 1
        build = await client.until(build_id, CANCELED)
        assert build.error == "its client left the queue"
        staying.cancel()


async def test_client_that_comes_back_keeps_its_place(gateway, client):
    lost = client.create(request_id="same")
    build_id = (await lost.read()).queued.build_id
    other = client.create()
    await other.read()
    lost.cancel()
    assert (await other.read()).queued.position == 1
    back = client.create(request_id="same")
    queued = (await back.read()).queued
    assert (queued.build_id, queued.position) == (build_id, 1)
    for stream in (back, other):
        stream.cancel()


async def test_cancelled_build_leaves_the_queue(gateway, client):
    stream = client.create()
    build_id = (await stream.read()).queued.build_id
    await client.call("Cancel", builds_pb.CancelRequest(build_id=build_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert isinstance(domain_error(caught.value), BuildCanceledError)
    build = await client.build(build_id)
    assert (build.state, build.error) == (CANCELED, "cancelled by admin")


async def test_cancelling_a_running_build_reaches_its_node(gateway, client):
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        node.update(build_id, RUNNING)
        reply = await client.call("Cancel", builds_pb.CancelRequest(build_id=build_id))
        assert reply.grace_period.seconds > 0
        await node.eventually(lambda: node.cancelled.get(build_id) == "cancelled by admin")
        node.update(build_id, CANCELED)
        assert (await client.until(build_id, CANCELED)).error == "cancelled by admin"


async def test_build_that_waits_too_long_is_refused():
    async with RunningGateway(queue_timeout=0.3) as gateway:
        client = await client_of(gateway)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.assigned()
        error = domain_error(caught.value)
        assert isinstance(error, QueueTimeoutError)
        assert "no node is attached" in error.message


async def test_full_queue_refuses_more_builds():
    async with RunningGateway(max_queued_builds=1) as gateway:
        client = await client_of(gateway)
        stream = client.create()
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.assigned()
        assert isinstance(domain_error(caught.value), QuotaExceededError)
        stream.cancel()


async def test_slot_is_given_back_when_the_client_never_arrives(gateway, client, monkeypatch):
    monkeypatch.setattr("offload_builder.gateway.admission.ARRIVAL_GRACE_SECONDS", -29.7)
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        build = await client.until(build_id, CANCELED)
        assert "did not arrive" in build.error
        await node.eventually(lambda: build_id in node.cancelled)


async def test_silent_node_is_lost_after_three_heartbeats_with_its_builds(gateway, client):
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        node.update(build_id, RUNNING)
        await asyncio.sleep(0.2)
        node.beats = False
        began = time.monotonic()
        build = await client.until(build_id, LOST)
        # Three intervals of 0.3 s, found out at most half an interval later.
        assert 0.5 < time.monotonic() - began < 2.0
        assert build.error.startswith("node node-1 was lost: it sent no heartbeat for")
        assert build.completed_at.seconds
        await node.eventually(lambda: node.ended is not None)
    info = (
        await (await gateway.admin()).ListNodes(
            identity_pb.ListNodesRequest(), metadata=call_metadata()
        )
    ).nodes[0]
    assert info.state == "lost"


async def test_node_that_does_not_come_back_is_lost_with_its_builds(gateway, client):
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        node.update(build_id, RUNNING)
        await asyncio.sleep(0.2)
        node.vanish()
        build = await client.until(build_id, LOST)
    assert "its connection broke" in build.error
    assert build.error.endswith("start the build again")


async def test_node_that_reconnects_keeps_its_builds(gateway, client):
    keys = await gateway.enroll_node("node-1")
    async with AttachedNode(gateway, "node-1", keys) as node:
        build_id = (await client.assigned()).build_id
        node.update(build_id, RUNNING)
        await asyncio.sleep(0.1)
    async with AttachedNode(gateway, "node-1", keys, running_build_ids=[build_id]) as node:
        await asyncio.sleep(1.2)
        assert (await client.build(build_id)).state == RUNNING
        node.update(build_id, SUCCEEDED, image_digest="sha256:" + "a" * 64)
        build = await client.until(build_id, SUCCEEDED)
    assert build.image_digest == "sha256:" + "a" * 64


async def test_build_of_a_lost_node_that_went_on_is_running_again(gateway, client):
    keys = await gateway.enroll_node("node-1")
    async with AttachedNode(gateway, "node-1", keys) as node:
        build_id = (await client.assigned()).build_id
        node.update(build_id, RUNNING)
        await asyncio.sleep(0.1)
    await client.until(build_id, LOST)
    async with AttachedNode(gateway, "node-1", keys, running_build_ids=[build_id]):
        assert (await client.until(build_id, RUNNING)).error == ""


async def test_unknown_build_of_a_node_is_ended(gateway):
    async with await node_of(gateway, running_build_ids=["aaaaaaaaaaaa"]) as node:
        await node.eventually(lambda: "aaaaaaaaaaaa" in node.cancelled)


async def test_node_cannot_change_the_build_of_another(gateway, client):
    async with await node_of(gateway, "node-1") as owner:
        build_id = (await client.assigned()).build_id
        owner.update(build_id, RUNNING)
        async with await node_of(gateway, "node-2") as other:
            other.update(build_id, FAILED, error="forged")
            other.log(build_id, 1, 3)
            await asyncio.sleep(0.3)
        build = await client.build(build_id)
        assert (build.state, build.error) == (RUNNING, "")
        assert await client.logs(build_id) == []


async def test_cache_state_may_change_after_the_end(gateway, client):
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        stats = builds_pb.BuildStats(steps_total=5, steps_cached=3)
        node.update(build_id, SUCCEEDED, stats=stats, cache_state=builds_pb.CACHE_STATE_PENDING)
        await client.until(build_id, SUCCEEDED)
        node.update(build_id, SUCCEEDED, cache_state=builds_pb.CACHE_STATE_PUBLISHED)
        async with asyncio.timeout(5):
            while True:
                build = await client.build(build_id)
                if build.cache_state == builds_pb.CACHE_STATE_PUBLISHED:
                    break
    assert build.stats == stats


async def test_log_is_followed_live_and_resumed(gateway, client):
    async with await node_of(gateway) as node:
        build_id = (await client.assigned()).build_id
        node.log(build_id, 1, 10)
        follower = asyncio.create_task(client.logs(build_id, follow=True), name="follower")
        await asyncio.sleep(0.2)
        node.log(build_id, 11, 20)
        # A node sends its journal again after a reconnect.
        node.log(build_id, 1, 20)
        await asyncio.sleep(0.2)
        assert not follower.done()
        assert await client.logs(build_id, after=15) == [16, 17, 18, 19, 20]
        node.update(build_id, SUCCEEDED)
        node.log(build_id, 21, 22)
        assert await follower == list(range(1, 23))
    assert await client.logs(build_id[:8], after=20) == [21, 22]


async def test_restart_keeps_history_logs_and_running_builds():
    async with RunningGateway(restart_grace=3.0) as gateway:
        client = await client_of(gateway)
        keys = await gateway.enroll_node("node-1")
        async with AttachedNode(gateway, "node-1", keys, slots=3) as node:
            done = (await client.assigned(name="done")).build_id
            node.log(done, 1, 5)
            node.update(done, SUCCEEDED)
            going = (await client.assigned(name="going")).build_id
            node.update(going, RUNNING)
            gone = (await client.assigned(name="gone")).build_id
            node.update(gone, RUNNING)
            await client.until(done, SUCCEEDED)
            await gateway.stop()
            await node.eventually(lambda: node.ended is not None)
            assert isinstance(domain_error(node.ended), GatewayUnreachableError)
        await gateway.start()
        client = await client_of(gateway)
        assert (await client.build(done)).name == "done"
        assert await client.logs(done) == [1, 2, 3, 4, 5]
        async with AttachedNode(gateway, "node-1", keys, running_build_ids=[going]):
            build = await client.until(gone, LOST, 8.0)
            assert "came back without it" in build.error
            assert (await client.build(going)).state == RUNNING
        listed = await client.call("List", builds_pb.ListRequest())
        assert [build.name for build in listed.builds] == ["gone", "going", "done"]


async def test_restart_loses_what_nobody_comes_back_for(gateway, client):
    async with await node_of(gateway) as node:
        running = (await client.assigned()).build_id
        node.update(running, RUNNING)
        stream = client.create()
        queued = (await stream.read()).queued.build_id
        await gateway.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert isinstance(domain_error(caught.value), GatewayUnreachableError)
        assert "stopping" in domain_error(caught.value).message
    await gateway.start()
    client = await client_of(gateway)
    for build_id in (running, queued):
        assert "restarted" in (await client.until(build_id, LOST)).error


async def test_waiting_client_survives_a_restart(gateway, client):
    stream = client.create(request_id="same")
    build_id = (await stream.read()).queued.build_id
    await gateway.stop()
    await gateway.start()
    client = await client_of(gateway)
    again = client.create(request_id="same")
    assert (await again.read()).queued.build_id == build_id
    async with await node_of(gateway):
        assert (await again.read()).assigned.build_id == build_id


async def test_members_see_only_builds_of_their_projects(gateway, client):
    await gateway.create_project("shop")
    token = await gateway.create_token("ann", identity_pb.ROLE_MEMBER, "shop")
    member = await client_of(gateway, token)
    async with await node_of(gateway, slots=2):
        hidden = (await client.assigned()).build_id
        own = (await member.assigned(project_id="shop")).build_id
    listed = await member.call("List", builds_pb.ListRequest())
    assert [build.build_id for build in listed.builds] == [own]
    for method, request in (
        ("Get", builds_pb.GetRequest(build_id=hidden)),
        ("Cancel", builds_pb.CancelRequest(build_id=hidden)),
    ):
        with pytest.raises(NotFoundError):
            await member.call(method, request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await member.logs(hidden)
    assert isinstance(domain_error(caught.value), NotFoundError)


async def test_unknown_project_is_answered_with_the_known_ones(gateway, client):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.assigned(project_id="defualt")
    error = domain_error(caught.value)
    assert isinstance(error, NotFoundError)
    assert error.message == 'there is no project "defualt"; known projects are default'
