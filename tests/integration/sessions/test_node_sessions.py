"""Sessions at a real node: real engines behind the firewall, docker's CLI through the API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from offload_builder.node.sessions.limits import duration
from offload_builder.node.sessions.nodesessions import RESTARTED
from offload_core.errors import NodeLostError
from offload_core.sessionmetadata import SESSION_KEY
from offload_core.status import error_from_rpc
from offload_core.tls import NODE_SUFFIX, open_channel
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.nodes_service_pb2 import Heartbeat
from offload_proto.v1.session_node_service_pb2 import (
    DiagnoseRequest,
    FollowRequest,
    Piece,
    PortOpen,
    PortRequest,
)
from offload_proto.v1.session_node_service_pb2_grpc import SessionNodeServiceStub
from offload_proto.v1.sessions_service_pb2 import SessionState
from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceStub
from tests.fixtures.guardedengine import Cli, busybox_archive
from tests.fixtures.node import NodePool
from tests.integration.sessions.sessionpeer import Member

ID = "5e55" * 4
IMAGE = "box"
PAUSED, ENDED = SessionState.SESSION_STATE_PAUSED, SessionState.SESSION_STATE_ENDED
GIB = 1 << 30
WAIT_SECONDS = 120.0


class World:
    """One node that takes sessions, and members who use them."""

    def __init__(self, pool, agent, owner) -> None:
        self.pool, self.agent, self.owner = pool, agent, owner
        self.session_id = ""

    async def start(self, **spec):
        """Have the gateway start a session; return the session at the node."""
        started = await self.owner.started(memory_bytes=GIB, disk_bytes=2 * GIB, **spec)
        self.session_id = started.session_id
        return self.agent.sessions.of(self.session_id)

    def metadata(self):
        return call_metadata((SESSION_KEY, self.session_id))

    @asynccontextmanager
    async def stub(self, keys=None):
        async with open_channel(
            self.agent.facts.listening,
            f"one{NODE_SUFFIX}",
            ca_pem=self.pool.gateway.ca_pem,
            keys=keys or self.pool.keys,
        ) as channel:
            yield SessionNodeServiceStub(channel)

    @asynccontextmanager
    async def docker(self, keys=None):
        """The docker CLI whose socket is carried to the node as a helper carries it."""
        tasks = set()
        async with self.stub(keys) as stub:

            def begin(reader, writer):
                task = asyncio.create_task(serve(reader, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            async def serve(reader, writer):
                call = stub.Engine(metadata=self.metadata())

                async def forth():
                    while data := await reader.read(1 << 18):
                        await call.write(Piece(data=data))
                    await call.write(Piece(ended=True))

                sending = asyncio.create_task(forth())
                with contextlib.suppress(OSError, grpc.RpcError):
                    while (piece := await call.read()) is not grpc.aio.EOF:
                        writer.write(piece.data)
                        await writer.drain()
                        if piece.ended and writer.can_write_eof():
                            writer.write_eof()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                call.cancel()
                writer.transport.abort()

            with tempfile.TemporaryDirectory(prefix="ns", dir="/tmp") as folder:
                server = await asyncio.start_unix_server(begin, Path(folder) / "s")
                try:
                    yield Cli(Path(folder) / "s", Path(folder))
                finally:
                    server.close()
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def world():
    async with NodePool() as pool:
        agent = await pool.start_node(isolation="netns", session_slots=1, drain_timeout=1.0)
        assert agent.sessions.problem == ""
        owner = Member(SessionsServiceStub(await pool.gateway.channel(pool.keys)))
        yield World(pool, agent, owner)


async def until(condition):
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.05)


def reason(error):
    return error_from_rpc(error, peer="the node", unreachable=NodeLostError).reason


def children(pid):
    """Return the processes of a namespace's first process, itself included; empty when gone."""
    return list(Path(f"/proc/{pid}").glob("task"))


async def test_a_session_is_used_paused_woken_and_stopped_and_leaves_nothing(world):
    session = await world.start()
    engine = session.engine
    assert (await world.owner.get(world.session_id)).engine_version == engine.version
    folder = world.agent.config.data / "sessions" / engine.engine_id
    async with world.docker() as docker, world.stub() as stub:
        following = stub.Follow(FollowRequest(), metadata=world.metadata())
        assert (await following.read()).state == SessionState.SESSION_STATE_RUNNING
        assert await docker("import", "-", IMAGE, stdin=busybox_archive()) == (0, ANY_DIGEST)
        code, out = await docker("run", "--rm", IMAGE, "echo", "hello")
        assert (code, out) == (0, "hello\n")
        code, out = await docker("run", "-i", "--rm", IMAGE, "cat", stdin=b"x" * 300_000)
        assert (code, out) == (0, "x" * 300_000)
        code, out = await docker("run", "-d", "--name", "web", "-p", "8081:80", IMAGE,
                                 "httpd", "-f", "-p", "80", "-h", "/")  # fmt: skip
        assert code == 0, out
        await until(lambda: session.containers == 1)
        assert not session.activity().HasField("pauses_at")
        call = stub.Port(metadata=world.metadata())
        await call.write(PortRequest(open=PortOpen(port=8081)))
        await call.write(PortRequest(piece=Piece(data=b"GET /nothing HTTP/1.0\r\n\r\n")))
        assert (await call.read()).data.startswith(b"HTTP/1.")
        call.cancel()
        texts = (await stub.Diagnose(DiagnoseRequest(), metadata=world.metadata())).texts
        assert '"ContainersRunning": 1' in texts["engine-info.json"]
        assert await docker("rm", "-f", "web") == (0, "web\n")
        await until(lambda: session.containers == 0)

        # Nobody uses it any more.
        session.life.limits = session.life.limits.__class__(session.limits.engine, 0.5, 600, 600)
        session.life.touch(session.life.ready_at)
        session._use_changed()
        await until(lambda: session.state == PAUSED and not engine.pid)
        used = session.used_seconds()
        session.life.limits = session.limits
        assert await docker("images", "-q", "--no-trunc", IMAGE) == (0, ANY_DIGEST)
        assert session.used_seconds() - used < 60
        opened = await world.owner.open(world.session_id)
        assert opened.session.state == SessionState.SESSION_STATE_RUNNING
        assert (await docker("run", "--rm", IMAGE, "echo", "again"))[1] == "again\n"

        pid = engine.pid
        stopped = await world.owner.stop(world.session_id)
        while (news := await following.read()) is not grpc.aio.EOF:
            last = news
        assert (last.state, last.reason) == (ENDED, stopped.reason)
        assert last.reason.startswith("stopped by ")
        assert not children(pid)
        assert not folder.exists()
        assert not list((world.agent.config.data / "session-records").iterdir())


class AnyDigest:
    def __eq__(self, other):
        return isinstance(other, str) and other.startswith("sha256:")

    __hash__ = None


ANY_DIGEST = AnyDigest()


async def test_only_the_owner_and_members_that_it_is_shared_with_may_use_a_session(world):
    session = await world.start()
    gateway = world.pool.gateway
    bob = await gateway.login(await gateway.create_token("bob", identity_pb.ROLE_MEMBER))
    async with world.stub(bob) as stub, world.docker(bob) as docker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Engine(metadata=world.metadata()).read()
        assert reason(caught.value) == "NOT_FOUND"
        assert (await docker("ps"))[0] != 0
        await world.owner.share(world.session_id, add=["bob"])
        assert (await docker("ps", "-q")) == (0, "")
        following = stub.Follow(FollowRequest(), metadata=world.metadata())
        await following.read()
        events = asyncio.create_task(docker("events"))
        await until(lambda: session.calls.counting == 1)
        await world.owner.share(world.session_id, remove=["bob"])
        code, _ = await events
        assert code != 0 or session.calls.counting == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await following.read() is not grpc.aio.EOF:
                pass
        assert reason(caught.value) == "FORBIDDEN"


async def test_an_engine_that_is_killed_ends_its_session_with_the_reason(world):
    session = await world.start(ttl=duration(600))
    folder = world.agent.config.data / "sessions" / session.engine.engine_id
    async with world.stub() as stub:
        following = stub.Follow(FollowRequest(), metadata=world.metadata())
        await following.read()
        os.kill(session.engine.pid, 9)
        while (news := await following.read()) is not grpc.aio.EOF:
            last = news
    assert last.state == ENDED
    assert last.reason.startswith("its docker engine ended")
    assert "\n" not in last.reason
    assert not folder.exists()
    beat = Heartbeat()
    world.agent.sessions.describe(beat)
    assert (beat.sessions, beat.sessions_problem) == (0, "")


async def test_a_node_that_stops_ends_its_sessions(world):
    session = await world.start()
    pid, folder = session.engine.pid, world.agent.config.data / "sessions"
    await world.pool.stop_node()
    assert session.state == ENDED
    assert session.reason == "the node stops"
    assert not children(pid)
    assert not [path for path in folder.iterdir() if path.is_dir()]


KILLED = """
import asyncio, sys
from pathlib import Path
from offload_builder.node.config import NodeConfig
from offload_builder.node.server import NodeServer
from offload_builder.node.sessions.contract import SessionPlace
from offload_proto.v1.sessions_service_pb2 import SessionSpec

async def main():
    address, data, session_id = sys.argv[1:]
    config = NodeConfig(gateway=address, data=Path(data), listen="127.0.0.1:0",
                        isolation="netns", session_slots=1, sessions_ready=0)
    async with NodeServer(config) as server:
        place = SessionPlace(session_id, "default", "ann", "member", "")
        spec = SessionSpec(memory_bytes=1 << 30, disk_bytes=2 << 30)
        session = await server.agent.sessions.start(place, spec)
        print(session.engine.pid, session.engine.engine_id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_node_that_was_killed_has_nothing_left_of_its_sessions_after_its_next_start(
    tmp_path,
):
    async with NodePool() as pool:
        options = {"isolation": "netns", "session_slots": 1}
        agent = await pool.start_node(**options)
        data = agent.config.data
        await pool.stop_node()
        log = (tmp_path / "log").open("wb")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, pool.link.address, str(data), ID,
            stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
        try:
            line = await asyncio.wait_for(process.stdout.readline(), WAIT_SECONDS)
            while line and not line.split()[0].isdigit():
                line = await asyncio.wait_for(process.stdout.readline(), WAIT_SECONDS)
            assert line, (tmp_path / "log").read_text()
            pid, engine_id = line.decode().split()
            assert children(pid)
        finally:
            log.close()
            process.kill()
            await process.communicate()
        assert (data / "sessions" / engine_id).is_dir()
        agent = await pool.start_node(**options)
        assert not children(pid)
        assert not [path for path in (data / "sessions").iterdir() if path.is_dir()]
        assert not list((data / "session-records").iterdir())
        (update,) = agent.hello().sessions
        assert (update.session_id, update.state, update.reason) == (ID, ENDED, RESTARTED)


async def test_a_node_without_a_firewall_takes_no_sessions_and_says_why():
    async with NodePool() as pool:
        agent = await pool.start_node(session_slots=1)
        beat = agent.heartbeat()
        assert "isolation" in beat.sessions_problem
        assert agent.hello().session_slots == 0
