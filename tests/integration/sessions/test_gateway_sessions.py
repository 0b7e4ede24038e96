"""How sessions come to be at a real gateway, with nodes that speak Attach."""

from __future__ import annotations

import asyncio

import pytest

from offload_core.errors import (
    AccessDeniedError,
    DeviceUnavailableError,
    InvalidValueError,
    NodeLostError,
    NotFoundError,
    QueueTimeoutError,
    QuotaExceededError,
    UsageError,
)
from offload_proto.v1 import identity_service_pb2 as identity_pb
from tests.fixtures.gateway import RunningGateway
from tests.integration.sessions.sessionpeer import (
    ENDED,
    RUNNING,
    peer_of,
    people,
)


@pytest.fixture
async def gateway():
    async with RunningGateway(restart_grace=0.4, client_grace=0.3) as running:
        yield running


async def test_member_gets_a_session_with_what_the_node_says_of_it(gateway):
    (ann,) = await people(gateway, "ann")
    options = {"endpoints": ["10.0.0.1:7444"], "relay_endpoint": "127.0.0.1:1"}
    async with await peer_of(gateway, **options) as node:
        found = await ann.ready(ann.start("web", cpu_millis=500))
        session = found.session
        task = node.started[session.session_id]
        assert (session.state, session.node_id, session.owner) == (RUNNING, "n1", "ann")
        assert (session.engine_version, session.limits.memory_bytes) == ("29.0.0", 1 << 30)
        assert session.expires_at.seconds - session.ready_at.seconds == 3600
        assert list(found.endpoints) == ["10.0.0.1:7444", gateway.address]
        assert found.server_name == "n1.node.offload"
        assert (task.owner, task.role, task.project_id) == ("ann", "member", "default")
        assert (task.spec.name, task.spec.cpu_millis, task.trust_domain) == ("web", 500, "")
        node.tell(session.session_id, RUNNING, used=100)
        async with asyncio.timeout(20):
            while (told := await ann.get(session.session_id)).used.seconds < 100:
                await asyncio.sleep(0.02)
        assert told.activity.running_containers == 3
        assert not told.HasField("cost")


async def test_session_waits_with_place_and_reason_until_a_slot_is_free(gateway):
    ann, bob = await people(gateway, "ann", "bob")
    call = ann.start("web")
    first = (await ann.first(call)).queued
    assert (first.position, first.reason) == (1, "no node is attached")
    async with await peer_of(gateway, session_slots=1) as node:
        await ann.ready(call)
        assert node.did("start") == [first.session_id]
        waiting = bob.start("web")
        queued = (await bob.first(waiting)).queued
        assert queued.reason == "the only node that can take it, n1, is full of sessions"
        other = ann.start("two")
        assert (await ann.first(other)).queued.position == 2
        await ann.stop(first.session_id)
        assert (await bob.ready(waiting)).session.owner == "bob"


async def test_what_no_node_can_do_is_refused_by_name(gateway):
    (ann,) = await people(gateway, "ann")
    limits = {"session_limits": {"memory_bytes": 8 << 30}}
    options = {"labels": {"zone": "a"}, "devices": ["acme.example/nic=eth0"], **limits}
    async with await peer_of(gateway, **options):
        await asyncio.sleep(0.5)
        cases = [
            ({"node_labels": {"zone": "b"}}, NotFoundError,
             "no node that takes sessions has the label zone=b; they have zone=a"),
            ({"gpu": True}, DeviceUnavailableError,
             "no node that takes sessions has a GPU; they have acme.example/nic=eth0"),
            ({"devices": ["a.example/b=c"]}, DeviceUnavailableError,
             ("no node that takes sessions has the device a.example/b=c; they have "
              "acme.example/nic=eth0")),
            ({"memory_bytes": 64 << 30}, NotFoundError,
             "no node gives a session 64GiB of memory; the most that one gives is 8GiB"),
        ]  # fmt: skip
        for wish, kind, sentence in cases:
            with pytest.raises(kind) as caught:
                await ann.started(**wish)
            assert caught.value.message == sentence
        assert await ann.listed(ended=True) == []
        await ann.started(node_labels={"zone": "a"}, devices=["acme.example/nic=eth0"])


async def test_pool_whose_nodes_take_no_sessions_says_so(gateway):
    (ann,) = await people(gateway, "ann")
    call = ann.start("early")
    await ann.first(call)
    async with await peer_of(gateway, session_slots=0) as node:
        node.problem = "it is not behind a firewall"
        with pytest.raises(NotFoundError, match="no node of this pool takes sessions"):
            await ann.ready(call)
        async with await peer_of(gateway, "n2") as able:
            able.problem = "its disk is full"
            await asyncio.sleep(0.3)
            queued = (await ann.first(ann.start("later"))).queued
            assert queued.reason == "node n2 takes no sessions now: its disk is full"


async def test_devices_are_given_to_one_session_at_a_time(gateway):
    (ann,) = await people(gateway, "ann")
    gpus = ["nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=all"]
    async with await peer_of(gateway, session_slots=5, devices=gpus):
        await asyncio.sleep(0.5)
        one = await ann.started("one", gpu=True)
        two = await ann.started("two", devices=["nvidia.com/gpu=1"])
        assert [*one.devices, *two.devices] == gpus[:2]
        call = ann.start("three", gpu=True)
        assert (await ann.first(call)).queued.reason == "other sessions have its GPU"
        await ann.stop(two.session_id)
        assert list((await ann.ready(call)).session.devices) == ["nvidia.com/gpu=1"]


async def test_another_node_is_tried_and_then_the_start_fails_with_the_sentence(gateway):
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as one, await peer_of(gateway, "n2") as two:
        one.refusal = ("NODE_LOST", "the engine did not start")
        session = await ann.started("web")
        assert session.node_id == "n2"
        two.refusal = one.refusal
        with pytest.raises(NodeLostError) as caught:
            await ann.started("more")
        assert "the engine did not start" in caught.value.message
        assert len(one.did("start")) + len(two.did("start")) in (3, 4)
        # A node that failed may have something left of it.
        assert set(one.did("stop")) <= set(one.did("start"))
        assert sorted(await ann.listed(ended=True)) == ["more", "web"]


async def test_node_that_has_no_room_is_asked_again(gateway):
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as node:
        node.refusal = ("QUOTA_EXCEEDED", "its engines are all in use")
        call = ann.start("web")
        await node.eventually(lambda: node.did("start"))
        node.refusal = None
        assert (await ann.ready(call)).session.node_id == "n1"
        assert len(node.did("start")) == 2


async def test_node_that_does_not_answer_is_given_up(gateway):
    gateway.options["session_start_timeout"] = 0.3
    await gateway.stop()
    await gateway.start()
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as node:
        node.silent = {"start"}
        with pytest.raises(NodeLostError, match=r"did not answer within 0\.3s"):
            await ann.started("web")
        await node.eventually(lambda: node.did("stop") == node.did("start"))


async def test_same_request_finds_the_same_session_again(gateway):
    (ann,) = await people(gateway, "ann")
    call = ann.start("web", request_id="r")
    session_id = (await ann.first(call)).queued.session_id
    call.cancel()
    again = ann.start("web", request_id="r")
    assert (await ann.first(again)).queued.session_id == session_id
    async with await peer_of(gateway):
        assert (await ann.ready(again)).session.session_id == session_id
        assert (await ann.started("web", request_id="r")).session_id == session_id
        await ann.stop(session_id)
        with pytest.raises(UsageError, match="has already made session"):
            await ann.started("web", request_id="r")


async def test_client_that_goes_away_ends_its_waiting_session(gateway):
    (ann,) = await people(gateway, "ann")
    call = ann.start("web")
    session_id = (await ann.first(call)).queued.session_id
    call.cancel()
    session = await ann.until(session_id, ENDED)
    assert session.reason == "its client left before it was ready"


async def test_client_that_goes_away_while_a_node_works_leaves_nothing_there(gateway):
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as node:
        node.silent = {"start"}
        call = ann.start("web")
        assert (await ann.first(call)).starting.node_id == "n1"
        call.cancel()
        await node.eventually(lambda: node.did("start"))
        (session_id,) = node.did("start")
        await ann.until(session_id, ENDED)
        assert node.did("stop") == [session_id]


async def test_queue_has_an_end(gateway):
    gateway.options["queue_timeout"] = 0.3
    await gateway.stop()
    await gateway.start()
    (ann,) = await people(gateway, "ann")
    with pytest.raises(QueueTimeoutError, match=r"no node became free within 0\.3s: no node is"):
        await ann.started("web")


async def test_bounds_names_and_roles_are_kept(gateway):
    gateway.options |= {"sessions_per_member": 2, "sessions_per_project": 3}
    await gateway.stop()
    await gateway.start()
    ann, bob = await people(gateway, "ann", "bob")
    (eve,) = await people(gateway, "eve", role=identity_pb.ROLE_UNTRUSTED)
    (bot,) = await people(gateway, "bot", role=identity_pb.ROLE_CI)
    async with await peer_of(gateway, session_slots=9):
        await ann.started("web")
        with pytest.raises(UsageError, match='you have an open session "web"'):
            await ann.started("web")
        for bad in ("-x", "a b", "x" * 41, "a/b"):
            with pytest.raises(InvalidValueError):
                await ann.started(bad)
        await ann.started("two")
        with pytest.raises(QuotaExceededError, match="you have 2 open sessions"):
            await ann.started("three")
        with pytest.raises(AccessDeniedError, match="an untrusted member may not start sessions"):
            await eve.started("web")
        await bot.started("web")
        with pytest.raises(QuotaExceededError, match='the project "default" has 3 open'):
            await bob.started("web")


async def test_untrusted_members_have_sessions_without_devices_where_that_is_allowed(gateway):
    gateway.options["sessions_untrusted"] = True
    await gateway.stop()
    await gateway.start()
    (eve,) = await people(gateway, "eve", role=identity_pb.ROLE_UNTRUSTED)
    async with await peer_of(gateway, devices=["nvidia.com/gpu=0"]) as node:
        session = await eve.started("web")
        task = node.started[session.session_id]
        assert (task.role, task.trust_domain) == ("untrusted", "untrusted-eve")
        with pytest.raises(AccessDeniedError, match="can have no devices"):
            await eve.started("gpu", gpu=True)
