"""Sessions at a real gateway, with nodes that speak Attach."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from offload_builder.cli.configuration import gateway_records
from offload_builder.cli.session import session as session_command
from offload_builder.gateway.audit import Query
from offload_builder.gateway.config import GatewayConfig
from offload_core.errors import (
    AccessDeniedError,
    AuthenticationError,
    BuildCanceledError,
    DeviceUnavailableError,
    InvalidValueError,
    NodeLostError,
    NotFoundError,
    QueueTimeoutError,
    QuotaExceededError,
    UsageError,
)
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from tests.fixtures.gateway import RunningGateway
from tests.integration.sessions.sessionpeer import (
    ENDED,
    FAILED,
    LOST,
    PAUSED,
    RUNNING,
    STOPPING,
    SessionPeer,
    member_of,
)

ROLE = identity_pb.ROLE_MEMBER


@pytest.fixture
async def gateway():
    async with RunningGateway(restart_grace=0.4, client_grace=0.3) as running:
        yield running


async def peer_of(gateway: RunningGateway, node_id: str = "n1", **options: Any) -> SessionPeer:
    return SessionPeer(gateway, node_id, await gateway.enroll_node(node_id), **options)


async def people(gateway: RunningGateway, *names: str, role: Any = ROLE) -> list[Any]:
    return [await member_of(gateway, await gateway.create_token(name, role)) for name in names]


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
             "no node that takes sessions has the device a.example/b=c; "
             "they have acme.example/nic=eth0"),
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
        with pytest.raises(NodeLostError, match="did not answer within 0.3s"):
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
        (session_id,) = node.did("start")
        await ann.until(session_id, ENDED)
        assert node.did("stop") == [session_id]


async def test_queue_has_an_end(gateway):
    gateway.options["queue_timeout"] = 0.3
    await gateway.stop()
    await gateway.start()
    (ann,) = await people(gateway, "ann")
    with pytest.raises(QueueTimeoutError, match="no node became free within 0.3s: no node is att"):
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


async def test_paused_session_is_woken_by_who_opens_it(gateway):
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as node:
        session_id = (await ann.started("web")).session_id
        node.tell(session_id, PAUSED, used=5)
        await ann.until(session_id, PAUSED)
        kept = await ann.open(session_id, keep_paused=True)
        assert (kept.session.state, kept.server_name) == (PAUSED, "n1.node.offload")
        assert (await ann.open(session_id)).session.state == RUNNING
        assert node.did("wake") == [session_id]
        node.tell(session_id, ENDED, used=7, reason="its time was over")
        ended = await ann.until(session_id, ENDED)
        assert (ended.reason, ended.used.seconds) == ("its time was over", 7)
        with pytest.raises(NotFoundError, match="its time was over"):
            await ann.open(session_id)


async def test_nobody_else_gets_in_before_it_is_shared(gateway):
    await gateway.create_project("shop")
    ann, bob = await people(gateway, "ann", "bob")
    token = await gateway.create_token("joe", ROLE, "shop")
    joe, admin = await member_of(gateway, token), await member_of(gateway)
    await people(gateway, "eve", role=identity_pb.ROLE_UNTRUSTED)
    async with await peer_of(gateway) as node:
        session_id = (await ann.started("web")).session_id
        for stranger in (bob, joe):
            for method in (stranger.get, stranger.open, stranger.stop, stranger.share):
                with pytest.raises(NotFoundError, match="there is no session"):
                    await method(session_id)
            assert await stranger.listed() == []
        assert await admin.listed() == ["web"]
        with pytest.raises(AccessDeniedError, match="has not shared it with you"):
            await admin.open(session_id)
        with pytest.raises(AccessDeniedError, match="only its owner may share it"):
            await admin.share(session_id, add=["bob"])
        for name, kind in (("joe", NotFoundError), ("nobody", NotFoundError),
                           ("eve", AccessDeniedError), ("ann", UsageError)):  # fmt: skip
            with pytest.raises(kind):
                await ann.share(session_id, add=[name])
        assert list((await ann.share(session_id, add=["bob"])).shared_with) == ["bob"]
        assert node.shared[session_id] == ["bob"]
        assert (await bob.open(session_id)).session.owner == "ann"
        assert await bob.listed() == ["web"]
        with pytest.raises(AccessDeniedError, match="only its owner and administrators may end it"):
            await bob.stop(session_id)
        with pytest.raises(AccessDeniedError):
            await bob.share(session_id, add=["admin"])
        await ann.share(session_id, remove=["bob"])
        assert node.shared[session_id] == []
        with pytest.raises(NotFoundError):
            await bob.open(session_id)
        assert (await admin.stop(session_id)).reason == "stopped by admin"
        assert node.open == {}


async def test_sessions_survive_a_restart_of_the_gateway(gateway):
    (ann,) = await people(gateway, "ann")
    keys = await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys, session_slots=1) as node:
        session = await ann.started("web")
        node.tell(session.session_id, RUNNING, used=50)
        await ann.share(session.session_id, add=["admin"])
        node.silent = {"start"}
        queued = ann.start("later", request_id="q")
        queued_id = (await ann.first(queued)).queued.session_id
        await gateway.stop()
    await gateway.start()
    (ann,) = await people(gateway, "ann")
    assert (await ann.get(session.session_id)).state == RUNNING
    again = SessionPeer(gateway, "n1", keys, session_slots=1, open_sessions=node.open)
    async with again as node:
        await node.eventually(lambda: node.did("share") == [session.session_id])
        assert node.shared[session.session_id] == ["admin"]
        found = await ann.open(session.session_id)
        assert found.session.used.seconds >= 50
        assert node.did("start") == []
        # The one that waited has lost its client with the gateway.
        assert (await ann.until(queued_id, LOST)).node_id == ""


@pytest.mark.parametrize("killed", [False, True])
async def test_start_that_a_restart_has_cut_off_begins_anew(gateway, killed):
    token = await gateway.create_token("ann", ROLE)
    ann, keys = await member_of(gateway, token), await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys) as node:
        node.silent = {"start"}
        await ann.first(ann.start("web", request_id="r"))
        (session_id,) = node.did("start")
        await gateway.stop()
    if killed:
        # A gateway that is killed writes nothing at its end.
        with closing(sqlite3.connect(gateway.directory / "gateway.sqlite")) as db, db:
            db.execute("UPDATE sessions SET state = 2, node_id = 'n1'")
    await gateway.start()
    ann = await member_of(gateway, token)
    call = ann.start("web", request_id="r")
    first = await ann.first(call)
    assert first.WhichOneof("state") == ("starting" if killed else "queued")
    async with SessionPeer(gateway, "n1", keys, open_sessions={session_id: RUNNING}) as node:
        assert (await ann.ready(call)).session.session_id == session_id
        assert [kind for kind, _ in node.work] == ["stop", "start"]


async def test_session_of_a_node_that_stays_away_is_lost_and_may_come_back(gateway):
    (ann,) = await people(gateway, "ann")
    keys = await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys) as node:
        web = (await ann.started("web")).session_id
        old = (await ann.started("old")).session_id
    lost = await ann.until(web, LOST)
    assert lost.reason.startswith("node n1 was lost: ")
    await ann.until(old, LOST)
    async with await peer_of(gateway, "n2"):
        await ann.started("old")
        async with SessionPeer(gateway, "n1", keys, open_sessions=node.open) as back:
            # Of two with the same name the owner has the new one.
            await back.eventually(lambda: back.did("stop") == [old])
            assert (await ann.until(web, RUNNING)).reason == ""
            assert (await ann.open(web)).session.node_id == "n1"


async def test_session_that_a_node_does_not_have_any_more_is_lost(gateway, monkeypatch):
    monkeypatch.setattr("offload_builder.gateway.sessions.tracking.LATE_NEWS_SECONDS", 0.2)
    (ann,) = await people(gateway, "ann")
    keys = await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys) as node:
        kept = (await ann.started("kept")).session_id
        gone = (await ann.started("gone")).session_id
        node.vanish()
        told = {kept: RUNNING, "0" * 16: RUNNING}
        async with SessionPeer(gateway, "n1", keys, open_sessions=told) as back:
            assert (await ann.until(gone, LOST)).reason == "node n1 came back without it"
            assert (await ann.get(kept)).state == RUNNING
            await back.eventually(lambda: back.did("stop") == ["0" * 16])


async def test_stop_of_a_session_whose_node_is_away_is_done_when_it_is_back(gateway):
    gateway.options["reconnect_grace"] = 20.0
    await gateway.stop()
    await gateway.start()
    (ann,) = await people(gateway, "ann")
    keys = await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys) as node:
        session_id = (await ann.started("web")).session_id
    with pytest.raises(NodeLostError, match="ends as soon as the node is back"):
        await ann.stop(session_id)
    assert (await ann.get(session_id)).state == STOPPING
    with pytest.raises(UsageError, match="is stopping"):
        await ann.open(session_id)
    async with SessionPeer(gateway, "n1", keys, open_sessions=node.open) as back:
        assert (await ann.until(session_id, ENDED)).reason == "stopped by ann"
        assert back.did("stop") == [session_id]


async def test_revoked_token_ends_its_sessions_also_those_that_wait(gateway):
    token = await gateway.create_token("ann", ROLE)
    ann, admin = await member_of(gateway, token), await member_of(gateway)
    async with await peer_of(gateway, session_slots=1) as node:
        session_id = (await ann.started("web")).session_id
        waiting = ann.start("more")
        queued_id = (await ann.first(waiting)).queued.session_id
        request = identity_pb.RevokeTokenRequest(token_id=token.split("_")[1])
        await (await gateway.admin()).RevokeToken(request, metadata=call_metadata())
        for name in (session_id, queued_id):
            ended = await admin.until(name, ENDED)
            assert ended.reason == f"the token {token.split('_')[1]} was revoked"
        assert node.did("stop") == [session_id]
        # The gate for revoked callers may be faster than the queue.
        with pytest.raises((BuildCanceledError, AuthenticationError)):
            await ann.ready(waiting)


async def test_usage_is_told_to_members_of_their_own_and_to_administrators_of_all(gateway):
    gateway.options |= {"cost_currency": "EUR", "cost_session_hour": 0.5, "cost_gpu_hour": 2.0}
    await gateway.stop()
    await gateway.start()
    ann, bob = await people(gateway, "ann", "bob")
    admin = await member_of(gateway)
    async with await peer_of(gateway, devices=["nvidia.com/gpu=0"]) as node:
        await asyncio.sleep(0.4)
        one = (await ann.started("web", gpu=True)).session_id
        two = (await bob.started("web")).session_id
        for session_id, hours in ((one, 2), (two, 1)):
            node.tell(session_id, ENDED, used=hours * 3600)
            await admin.until(session_id, ENDED)
    found = await admin.usage()
    assert {name: item.cost.micros for name, item in found.items()} == {
        "ann": 5_000_000, "bob": 500_000,
    }  # fmt: skip
    assert list(found) == ["ann", "bob"]
    assert (found["ann"].cost.currency, found["ann"].sessions) == ("EUR", 1)
    assert list(await bob.usage()) == ["bob"]
    session = await ann.get(one)
    assert (session.cost.micros, session.cost.micros_per_hour) == (5_000_000, 2_500_000)


async def test_failed_start_is_shown_as_failed(gateway):
    (ann,) = await people(gateway, "ann")
    async with await peer_of(gateway) as node:
        node.refusal = ("INTERNAL", "no\x1b[2J")
        with pytest.raises(NodeLostError):
            await ann.started("web")
        (session_id,) = node.did("start")
        session = await ann.get(session_id)
        assert session.state == FAILED
        assert session.reason == "node n1 could not make the session: no\ufffd[2J"


async def test_operator_lists_sessions_and_ends_one_beside_the_gateway(gateway, capsys):
    ann, bob = await people(gateway, "ann", "bob")
    async with await peer_of(gateway) as node:
        session_id = (await ann.started("web")).session_id
        waiting = await bob.started("own")
        node.tell(session_id, PAUSED, used=90)
        await ann.until(session_id, PAUSED)
        listed = json.loads(await operate(gateway, capsys, "ls", "--format", "json"))
        assert {(row["name"], row["owner"], row["state"]) for row in listed} == {
            ("web", "ann", "paused"), ("own", "bob", "running"),
        }  # fmt: skip
        table = await operate(gateway, capsys, "ls", "--member", "ann")
        assert "1m30s" in table
        assert "own" not in table
        assert await operate(gateway, capsys, "stop", session_id) == f"{session_id}\n"
        assert (await ann.until(session_id, ENDED)).reason.startswith("stopped by the operator ")
        assert node.did("stop") == [session_id]
        found = json.loads(await operate(gateway, capsys, "usage", "default", "--format", "json"))
        assert [(row["member"], row["used_seconds"]) for row in found][0] == ("ann", 90.0)
        assert waiting.session_id in await operate(gateway, capsys, "ls")
        assert session_id not in await operate(gateway, capsys, "ls")
        assert session_id in await operate(gateway, capsys, "ls", "--all")


async def operate(gateway: RunningGateway, capsys: Any, *arguments: str) -> str:
    """Run `offload-builder session` and return what it prints."""
    capsys.readouterr()
    words = [arguments[0], "--data-dir", str(gateway.directory), *arguments[1:]]
    await asyncio.to_thread(session_command.main, words, standalone_mode=False)
    return str(capsys.readouterr().out)


async def test_what_members_do_with_sessions_is_in_the_audit_log(gateway):
    ann, bob = await people(gateway, "ann", "bob")
    async with await peer_of(gateway):
        session_id = (await ann.started("web")).session_id
        await ann.share(session_id, add=["bob"])
        with pytest.raises(AccessDeniedError):
            await bob.stop(session_id)
        await ann.stop(session_id)
    config = GatewayConfig(data_dir=gateway.directory)
    async with gateway_records(config) as (_, audit):
        records = await audit.read(Query(action="session"))
    assert [(item.action, item.member, item.result, item.detail) for item in records] == [
        ("session.started", "ann", "ok", f"{session_id} web"),
        ("session.shared", "ann", "ok", f"{session_id} +bob"),
        ("session.stopped", "bob", "FORBIDDEN", records[2].detail),
        ("session.stopped", "ann", "ok", f"{session_id} web of ann"),
    ]
    assert {item.project_id for item in records if item.result == "ok"} == {"default"}
