"""What becomes of sessions at a real gateway, with nodes that come, go and say things."""

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
    NodeLostError,
    NotFoundError,
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
    ROLE,
    RUNNING,
    STARTING,
    STOPPING,
    SessionPeer,
    member_of,
    peer_of,
    people,
)


@pytest.fixture
async def gateway():
    async with RunningGateway(restart_grace=0.4, client_grace=0.3) as running:
        yield running


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
    gateway.options["restart_grace"] = 4.0
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
    gateway.options["restart_grace"] = 20.0
    token = await gateway.create_token("ann", ROLE)
    ann, keys = await member_of(gateway, token), await gateway.enroll_node("n1")
    async with SessionPeer(gateway, "n1", keys) as node:
        node.silent = {"start"}
        await ann.first(ann.start("web", request_id="r"))
        await node.eventually(lambda: node.did("start"))
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
        # What is still there of the first start goes before the second one.
        *first, last = [kind for kind, _ in node.work]
        assert (set(first), last) == ({"stop"}, "start")


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
        told = {kept: RUNNING, "0" * 16: RUNNING, "1" * 16: STARTING}
        async with SessionPeer(gateway, "n1", keys, open_sessions=told) as back:
            assert (await ann.until(gone, LOST)).reason == "node n1 came back without it"
            assert (await ann.get(kept)).state == RUNNING
            await back.eventually(lambda: back.did("stop") == ["0" * 16, "1" * 16])


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
        assert next((row["member"], row["used_seconds"]) for row in found) == ("ann", 90.0)
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
