"""What the gateway asks of nodes to make sessions and to end them, in which order."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.gateway.members import DEFAULT_PROJECT, Members
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.sessions import ending as ending_module
from offload_builder.gateway.sessions.active import ActiveSessions
from offload_builder.gateway.sessions.cost import Rates
from offload_builder.gateway.sessions.ending import SessionEnding
from offload_builder.gateway.sessions.making import SessionMaker, last_failure
from offload_builder.gateway.sessions.table import (
    ENDED,
    PAUSED,
    QUEUED,
    RUNNING,
    STARTING,
    STOPPING,
    SessionRecord,
    SessionsTable,
)
from offload_builder.gateway.store import Store
from offload_builder.gateway.tokens import TokenRecord
from offload_core.errors import InternalError, NodeLostError, QuotaExceededError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode
    from offload_builder.gateway.sessions.active import ActiveSession

NOW = datetime.now(UTC)
SESSION = "a" * 16


class World:
    """A node that the test answers for, and sessions in a real store."""

    def __init__(self, store: Store) -> None:
        self.members = Members(store, lambda: "f")
        self.active = ActiveSessions(SessionsTable(store))
        self.nodes = NodeRegistry(5.0, 5.0)
        self.ending = SessionEnding(self.active, self.nodes, self.members)
        self.maker = SessionMaker(5.0, self.active, Rates("EUR", 10, 5), self)
        self.requeued: list[str] = []

    def requeue(self, session: ActiveSession) -> None:
        self.requeued.append(session.session_id)
        self.active.change(session, state=QUEUED, node_id="")

    def wake(self) -> None:
        """Nothing waits here."""

    def attach(self, **hello: Any) -> AttachedNode:
        token = TokenRecord("n", "", "n", identity_pb.ROLE_NODE, (), NOW)
        return self.nodes.attach("n1", token, nodes_pb.Hello(session_slots=2, **hello))

    async def session(self, state: int, project_id: str = DEFAULT_PROJECT) -> ActiveSession:
        record = SessionRecord(
            session_id=SESSION, request_id="r", project_id=project_id, owner="ann", token_id="t",
            role=identity_pb.ROLE_MEMBER, name="web", state=state, created_at=NOW, node_id="n1",
        )  # fmt: skip
        await self.active.table.insert(record)
        return self.active.add(record)


@pytest.fixture
async def world():
    async with Store("sqlite://") as store:
        made = World(store)
        await made.members.create_project(DEFAULT_PROJECT)
        yield made
        await made.maker.close()


async def asked(node: AttachedNode) -> list[nodes_pb.SessionTask]:
    """Return the next work that the node is asked for."""
    assert node.connection is not None
    async with asyncio.timeout(10):
        return [message.session_task for message in await node.connection.take()]


def reply(node: AttachedNode, task: nodes_pb.SessionTask, **values: Any) -> None:
    node.take_session_reply(nodes_pb.SessionTaskReply(task_id=task.task_id, **values))


async def settle(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_what_the_node_still_has_of_a_former_start_goes_first(world):
    node = world.attach(sessions=[nodes_pb.SessionUpdate(session_id=SESSION, state=RUNNING)])
    session = await world.session(QUEUED)
    world.maker.make(session, node, ("nvidia.com/gpu=0",))
    assert session.devices_at_node() == ("nvidia.com/gpu=0",)
    (stop,) = await asked(node)
    assert stop.HasField("stop")
    reply(node, stop)
    (start,) = await asked(node)
    assert start.start.owner == "ann"
    reply(node, start, started=nodes_pb.StartedSession(devices=["nvidia.com/gpu=1"]))
    await settle(lambda: session.record.state == RUNNING)
    assert session.devices_at_node() == ("nvidia.com/gpu=1",)
    assert (session.record.currency, session.record.micros_per_hour) == ("EUR", 15)


@pytest.mark.parametrize("answer", [{}, {"error": "no", "error_reason": "QUOTA_EXCEEDED"}])
async def test_session_that_is_not_made_is_removed_there_and_waits_again(world, answer):
    node, session = world.attach(), await world.session(QUEUED)
    world.maker.make(session, node, ())
    (start,) = await asked(node)
    assert session.record.state == STARTING
    reply(node, start, **answer)
    (stop,) = await asked(node)
    assert stop.HasField("stop")
    assert world.requeued == [SESSION]
    # A full node is asked again, one that fails is not.
    assert (set(session.failed), session.busy) == ((set(), {"n1"}) if answer else ({"n1"}, set()))


async def test_answer_for_a_session_that_was_stopped_meanwhile_changes_nothing(world):
    node, session = world.attach(), await world.session(QUEUED)
    world.maker.make(session, node, ())
    (start,) = await asked(node)
    stopped = asyncio.ensure_future(world.ending.stop(session, "stopped by ann"))
    (stop,) = await asked(node)
    assert session.record.state == STOPPING
    reply(node, start, started=nodes_pb.StartedSession())
    reply(node, stop)
    await stopped
    assert (session.record.state, session.record.reason) == (ENDED, "stopped by ann")
    assert world.requeued == []


async def test_two_who_stop_a_session_ask_its_node_once(world):
    node, session = world.attach(), await world.session(RUNNING)
    first = asyncio.ensure_future(world.ending.stop(session, "stopped by ann"))
    second = asyncio.ensure_future(world.ending.stop(session, "stopped by admin"))
    (stop,) = await asked(node)
    second.cancel()
    reply(node, stop)
    await first
    assert session.record.reason == "stopped by ann"


async def test_stop_that_fails_is_tried_again_until_nothing_is_left(world, monkeypatch):
    monkeypatch.setattr(ending_module, "POLL_SECONDS", 0.02)
    node, session = world.attach(), await world.session(PAUSED)
    stopped = asyncio.ensure_future(world.ending.stop(session, "stopped by ann"))
    (stop,) = await asked(node)
    reply(node, stop, error="its disk does not let go", error_reason="INTERNAL")
    with pytest.raises(InternalError, match="does not let go"):
        await stopped
    assert session.record.state == STOPPING
    running = asyncio.ensure_future(world.ending.run())
    (again,) = await asked(node)
    reply(node, again)
    await settle(lambda: session.record.state == ENDED)
    running.cancel()
    await asyncio.wait([running])


async def test_session_of_a_project_that_is_gone_ends(world, monkeypatch):
    monkeypatch.setattr(ending_module, "POLL_SECONDS", 0.02)
    node, session = world.attach(), await world.session(RUNNING, project_id="gone")
    running = asyncio.ensure_future(world.ending.run())
    (stop,) = await asked(node)
    assert stop.stop.reason == "its project does not exist any more"
    reply(node, stop)
    await settle(lambda: session.record.state == ENDED)
    running.cancel()
    await asyncio.wait([running])


async def test_pause_is_not_counted_when_the_session_runs_again(world):
    session = await world.session(RUNNING)
    world.active.note_time(session, 1000, b"")
    world.active.change(session, state=PAUSED)
    session.told_at -= 3600
    world.active.change(session, state=RUNNING)
    assert session.used_milliseconds() < 60_000


async def test_last_failure_is_that_of_the_last_node_and_no_fault_of_ours(world):
    session = await world.session(QUEUED)
    session.failed = {"a": QuotaExceededError("full"), "b": InternalError("broken")}
    error = last_failure(session)
    assert type(error) is NodeLostError
    assert error.message == (
        "node b could not make the session, and 1 more could not either: broken"
    )
