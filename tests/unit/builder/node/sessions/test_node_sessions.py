"""The life of sessions at a node, with engines that are nothing but a socket."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from offload_builder.node.config import NodeConfig
from offload_builder.node.sessions.contract import SessionPlace
from offload_builder.node.sessions.limits import Machine, SessionBounds
from offload_builder.node.sessions.nodesessions import RESTARTED, STOPPING, NodeSessions
from offload_builder.node.sessions.sessiontasks import SessionTasks
from offload_builder.node.sessions.upkeep import IDLE, TIME_OVER
from offload_core.errors import NodeLostError, NotFoundError, QuotaExceededError
from offload_proto.v1.nodes_service_pb2 import (
    AttachResponse,
    Heartbeat,
    Hello,
    SessionTask,
    ShareTask,
    StartTask,
    StopTask,
    WakeTask,
)
from offload_proto.v1.sessions_service_pb2 import SessionSpec, SessionState
from tests.fixtures.standinengine import DirectDoor, NoCopies, NoModels, NoNetworks, StandInHost

PLACE = SessionPlace("a" * 16, "shop", "ann", "member", "shop")
RUNNING, PAUSED, ENDED = (
    SessionState.SESSION_STATE_RUNNING,
    SessionState.SESSION_STATE_PAUSED,
    SessionState.SESSION_STATE_ENDED,
)
GIB = 1 << 30


class Gateway:
    """Hears of sessions, and takes replies."""

    def __init__(self) -> None:
        self.updates = []
        self.replies = []

    def report_session(self, update):
        self.updates.append(update)

    def beat(self):
        pass

    async def send(self, message):
        self.replies.append(message.session_task_reply)
        return True

    def states(self, session_id=PLACE.session_id):
        found = [item.state for item in self.updates if item.session_id == session_id]
        return [state for at, state in enumerate(found) if at == 0 or found[at - 1] != state]


@asynccontextmanager
async def node(tmp_path, **options):
    settings = {"session_slots": 2, "session_disk": GIB, "session_memory": GIB, **options}
    config = NodeConfig(gateway="g:1", data=tmp_path, disk_reserve=0, **settings)
    bounds = SessionBounds(config, Machine(2.0, 16 * GIB), 100 * GIB)
    gateway, networks, models = Gateway(), NoNetworks(), NoModels()
    async with (
        StandInHost(tmp_path) as host,
        NodeSessions(
            config, bounds, host, networks, DirectDoor, models, NoCopies(), gateway, lambda: None
        ) as sessions,
    ):
        sessions.networks_of_test, sessions.models_of_test = networks, models
        yield sessions, host, gateway


async def follow(session, news):
    async for item in session.follow("ann"):
        news.append(item)


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_session_is_made_told_found_by_its_owner_and_stopped(tmp_path):
    async with node(tmp_path) as (sessions, host, gateway):
        session = await sessions.start(PLACE, SessionSpec())
        assert session.state == RUNNING
        assert session.started().engine_version == "29.0.0"
        assert sessions.networks_of_test.assigned == {"e1": "shop"}
        assert host.specs[0].limits.disk_bytes == GIB
        assert sessions.find(PLACE.session_id, "ann") is session
        hello, beat = Hello(), Heartbeat()
        sessions.introduce(hello)
        sessions.describe(beat)
        assert (hello.session_slots, beat.sessions) == (2, 1)
        assert [item.session_id for item in hello.sessions] == [PLACE.session_id]
        await sessions.stop(PLACE.session_id, "its owner wanted it")
        assert host.engines == {}
        models = sessions.models_of_test
        assert (models.kept, models.forgotten) == (["e1"], ["e1"])
        assert gateway.updates[-1].reason == "its owner wanted it"
        assert gateway.states()[-2:] == [SessionState.SESSION_STATE_STOPPING, ENDED]
        hello = Hello()
        sessions.introduce(hello)
        assert [item.state for item in hello.sessions] == [ENDED]
        await sessions.stop(PLACE.session_id, "again")


async def test_who_may_not_use_a_session_learns_nothing_of_it(tmp_path):
    async with node(tmp_path) as (sessions, _, _gateway):
        await sessions.start(PLACE, SessionSpec())
        with pytest.raises(NotFoundError) as foreign:
            sessions.find(PLACE.session_id, "bob")
        with pytest.raises(NotFoundError) as unknown:
            sessions.find("b" * 16, "bob")
        assert str(foreign.value).replace("a" * 16, "") == str(unknown.value).replace("b" * 16, "")


async def test_the_same_session_is_made_once_and_a_third_one_refused(tmp_path):
    async with node(tmp_path) as (sessions, host, _):
        first, again = await asyncio.gather(
            sessions.start(PLACE, SessionSpec()), sessions.start(PLACE, SessionSpec())
        )
        assert first is again
        await sessions.start(SessionPlace("b" * 16, "shop", "bob", "member", ""), SessionSpec())
        with pytest.raises(QuotaExceededError, match="all 2 sessions of this node are in use"):
            await sessions.start(SessionPlace("c" * 16, "shop", "bob", "", ""), SessionSpec())
        assert len(host.specs) == 2


async def test_a_session_whose_engine_does_not_start_leaves_nothing(tmp_path):
    async with node(tmp_path) as (sessions, host, _):
        host.fails = "dockerd says no"
        with pytest.raises(NodeLostError, match="dockerd says no"):
            await sessions.start(PLACE, SessionSpec())
        assert sessions.open_sessions() == []
        assert sessions.reserved.slots_left == 2
        await until(lambda: not list((tmp_path / "session-records").iterdir()))
        host.fails = ""
        await sessions.start(PLACE, SessionSpec())


async def test_a_session_that_is_stopped_while_it_is_made_leaves_nothing(tmp_path):
    async with node(tmp_path) as (sessions, host, _):
        host.hold.clear()
        starting = asyncio.ensure_future(sessions.start(PLACE, SessionSpec()))
        await until(lambda: host.specs)
        await sessions.stop(PLACE.session_id, "no more wanted")
        with pytest.raises(NodeLostError, match="stopped while its engine was made"):
            await starting
        assert sessions.open_sessions() == []
        assert sessions.reserved.slots_left == 2


async def test_an_unused_session_is_paused_woken_once_for_all_and_removed_at_last(tmp_path):
    options = {"session_idle": 0.3, "session_grace": 30.0}
    async with node(tmp_path, **options) as (sessions, host, gateway):
        session = await sessions.start(PLACE, SessionSpec())
        await until(lambda: session.state == PAUSED)
        await until(lambda: host.paused == ["e1"])
        assert session.activity().HasField("removed_at")
        used = session.used_seconds()
        await asyncio.gather(*(sessions.wake(session) for _ in range(3)))
        assert host.woken == ["e1"]
        assert session.used_seconds() - used < 5
        assert session.activity().HasField("pauses_at")
        await until(lambda: session.state == PAUSED)
        session.life.limits = session.life.limits.__class__(session.limits.engine, 0.3, 0.1, 60.0)
        await sessions.wake(session)
        await until(lambda: session.state == ENDED)
        assert session.reason == IDLE
        assert host.engines == {}
        assert gateway.states()[0] == RUNNING


async def test_a_running_container_keeps_a_session_from_being_paused(tmp_path):
    async with node(tmp_path, session_idle=0.3) as (sessions, host, _):
        session = await sessions.start(PLACE, SessionSpec())
        engine = host.engines["e1"]
        engine.run(2)
        await until(lambda: session.containers == 2)
        assert not session.activity().HasField("pauses_at")
        await asyncio.sleep(0.6)
        assert session.state == RUNNING
        engine.run(0)
        await until(lambda: session.state == PAUSED)


async def test_the_death_of_an_engine_ends_its_session_with_the_reason(tmp_path):
    async with node(tmp_path) as (sessions, host, gateway):
        session = await sessions.start(PLACE, SessionSpec())
        news = []
        following = asyncio.ensure_future(follow(session, news))
        await until(lambda: news)
        host.engines["e1"].ended.set_result("dockerd was killed\nlast words")
        await asyncio.wait_for(following, 20)
        assert news[-1].state == ENDED
        assert news[-1].reason == "its docker engine ended: dockerd was killed"
        assert gateway.updates[-1].reason == news[-1].reason


async def test_the_end_of_its_time_ends_a_session_after_a_warning(tmp_path):
    options = {"session_ttl": 61.0}
    async with node(tmp_path, **options) as (sessions, _, _gateway):
        session = await sessions.start(PLACE, SessionSpec())
        news = []
        following = asyncio.ensure_future(follow(session, news))
        await until(lambda: any("its time is over" in item.warning for item in news))
        session.life.ready_at -= 60.0
        session.tell()
        session._use_changed()
        await asyncio.wait_for(following, 20)
        assert session.reason == TIME_OVER


async def test_an_engine_that_does_not_wake_ends_its_session(tmp_path):
    async with node(tmp_path, session_idle=0.2) as (sessions, host, _):
        session = await sessions.start(PLACE, SessionSpec())
        await until(lambda: host.paused)
        host.fails = "its disk is broken"
        with pytest.raises(NodeLostError, match="its disk is broken"):
            await sessions.wake(session)
        await until(lambda: session.state == ENDED)
        with pytest.raises(NodeLostError, match="has ended"):
            await sessions.wake(session)


async def test_what_cannot_be_removed_stays_reserved_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.sessions.nodesessions.REMOVE_TRIES", 1)
    async with node(tmp_path) as (sessions, host, gateway):
        await sessions.start(PLACE, SessionSpec())
        host.stuck = True
        with pytest.raises(NodeLostError, match="not everything"):
            await sessions.stop(PLACE.session_id, "stop")
        assert sessions.reserved.slots_left == 1
        assert gateway.updates[-1].state == ENDED


async def test_sessions_of_a_process_that_was_killed_are_told_as_ended(tmp_path):
    async with node(tmp_path) as (sessions, _, _gateway):
        await sessions.start(PLACE, SessionSpec())
        (record,) = (tmp_path / "session-records").iterdir()
        kept = record.read_bytes()
    record.write_bytes(kept)
    (tmp_path / "session-records" / "broken.json").write_bytes(b"{")
    async with node(tmp_path) as (sessions, _, gateway):
        (update,) = gateway.updates
        assert (update.session_id, update.state) == (PLACE.session_id, ENDED)
        assert update.reason == RESTARTED
        assert not list((tmp_path / "session-records").iterdir())
        assert sessions.open_sessions() == []


async def test_a_drain_ends_unused_sessions_at_once_and_the_others_after_its_patience(tmp_path):
    async with node(tmp_path) as (sessions, host, _):
        used = await sessions.start(PLACE, SessionSpec())
        unused = await sessions.start(
            SessionPlace("b" * 16, "shop", "bob", "member", ""), SessionSpec()
        )
        host.engines["e1"].run(1)
        await until(lambda: used.containers == 1)
        draining = asyncio.ensure_future(sessions.drain(1.0))
        await until(lambda: unused.state == ENDED)
        assert used.state == RUNNING
        with pytest.raises(QuotaExceededError, match="draining"):
            await sessions.start(SessionPlace("c" * 16, "shop", "bob", "", ""), SessionSpec())
        await draining
        assert (used.state, used.reason) == (ENDED, STOPPING)


async def test_tasks_of_the_gateway_are_answered(tmp_path):
    async with node(tmp_path) as (sessions, host, gateway):
        tasks = SessionTasks(sessions, gateway)

        async def ask(session_id=PLACE.session_id, **task):
            number = len(gateway.replies)
            message = SessionTask(task_id=f"t{number}", session_id=session_id, **task)
            tasks.take_message(AttachResponse(session_task=message))
            await until(lambda: len(gateway.replies) > number)
            assert gateway.replies[-1].task_id == f"t{number}"
            return gateway.replies[-1]

        start = StartTask(project_id="shop", owner="ann", role="member", spec=SessionSpec())
        started = (await ask(start=start)).started
        assert started.limits.cpu_millis == 2000
        assert started.limits.idle_timeout.seconds == 300
        assert gateway.updates[-1].activity.HasField("pauses_at")
        assert (await ask(share=ShareTask(members=["bob"]))).error == ""
        assert sessions.find(PLACE.session_id, "bob")
        assert (await ask(wake=WakeTask())).error == ""
        assert (await ask(stop=StopTask(reason="enough"))).error == ""
        assert host.engines == {}
        assert (await ask(stop=StopTask())).error == ""
        assert (await ask(wake=WakeTask())).error_reason == "NOT_FOUND"
        assert (await ask()).error_reason == "USAGE"
        assert (await ask("../x", stop=StopTask())).error_reason == "USAGE"
        large = SessionSpec(memory_bytes=1 << 50)
        reply = await ask(start=StartTask(project_id="shop", owner="ann", spec=large))
        assert reply.error_reason == "VALUE_INVALID"
        await tasks.close()
