"""Calls of members to sessions of a node, over gRPC as it is served there."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager

import grpc
import pytest

from offload_builder.node.config import NodeConfig
from offload_builder.node.sessions import calls, service
from offload_builder.node.sessions.contract import SessionPlace
from offload_builder.node.sessions.limits import Machine, SessionBounds
from offload_builder.node.sessions.nodesessions import NodeSessions
from offload_builder.node.sessions.room import MAX_PIECE, MIN_PIECE
from offload_builder.node.sessions.service import SessionNode, add_session_node
from offload_builder.node.sessions.sessionmetrics import SessionMetrics
from offload_core.errors import NodeLostError
from offload_core.interceptors import ErrorInterceptor
from offload_core.sessionmetadata import SESSION_KEY, UNATTENDED_KEY
from offload_core.status import error_from_rpc
from offload_core.tls import Identity
from offload_core.versions import call_metadata
from offload_proto.v1.session_node_service_pb2 import (
    DiagnoseRequest,
    FollowRequest,
    Piece,
    PortOpen,
    PortRequest,
)
from offload_proto.v1.session_node_service_pb2_grpc import (
    SessionNodeServiceStub,
)
from offload_proto.v1.sessions_service_pb2 import SessionSpec, SessionState
from tests.fixtures.standinengine import DirectDoor, NoCopies, NoModels, NoNetworks, StandInHost

ID = "a" * 16
PLACE = SessionPlace(ID, "shop", "ann", "member", "shop")
PAUSED = SessionState.SESSION_STATE_PAUSED
GIB = 1 << 30
WHO = "x-test-member"


class Silent:
    def report_session(self, update):
        pass


class World:
    def __init__(self, sessions, host, stub):
        self.sessions, self.host, self.stub = sessions, host, stub
        self.session = None

    @property
    def engine(self):
        return self.host.engines["e1"]

    def metadata(self, member="ann", session_id=ID, *more):
        return call_metadata((SESSION_KEY, session_id), (WHO, member), *more)

    async def call(self, *more, member="ann"):
        """Open a connection to the engine and say what makes it an echo."""
        call = self.stub.Engine(metadata=self.metadata(member, ID, *more))
        await call.write(Piece(data=b"ECHO\n"))
        return call


@asynccontextmanager
async def world(tmp_path, monkeypatch, **options):
    monkeypatch.setattr(
        service,
        "member_identity",
        lambda context: Identity("member", dict(context.invocation_metadata())[WHO], "t", "member"),
    )
    settings = {"session_disk": GIB, "session_memory": GIB, **options}
    config = NodeConfig(gateway="g:1", data=tmp_path, disk_reserve=0, **settings)
    bounds = SessionBounds(config, Machine(2.0, 16 * GIB), 100 * GIB)
    server = grpc.aio.server(interceptors=(ErrorInterceptor("this node"),))
    async with (
        StandInHost(tmp_path) as host,
        NodeSessions(
            config,
            bounds,
            host,
            NoNetworks(),
            DirectDoor,
            NoModels(),
            NoCopies(),
            Silent(),
            lambda: None,
        ) as sessions,
    ):
        add_session_node(SessionNode(sessions), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                made = World(sessions, host, SessionNodeServiceStub(channel))
                made.session = await sessions.start(PLACE, SessionSpec())
                async with asyncio.timeout(40):
                    yield made
        finally:
            await server.stop(0)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def read_all(call) -> bytes:
    """Return what comes until the end of that direction."""
    parts = []
    while (piece := await call.read()) is not grpc.aio.EOF and not piece.ended:
        parts.append(piece.data)
    return b"".join(parts)


def reason(error):
    return error_from_rpc(error, peer="the node", unreachable=NodeLostError).reason


async def test_bytes_pass_both_ways_and_half_closes_too(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        call = await there.call()
        sent = os.urandom(5_000_000)

        async def send():
            for at in range(0, len(sent), 1 << 20):
                await call.write(Piece(data=sent[at : at + (1 << 20)]))
            await call.write(Piece(ended=True))

        sending = asyncio.ensure_future(send())
        assert await read_all(call) == sent + b"the end"
        await sending
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        await until(lambda: there.session.calls.counting == 0)
        assert there.session.received_bytes == len(sent) + 5
        assert there.session.sent_bytes == len(sent) + 7
        (states, _, traffic, _) = SessionMetrics(there.sessions).collect()
        assert {item.labels["state"]: item.value for item in states.samples}["running"] == 1
        assert traffic.samples[0].value == len(sent) + 5


async def test_a_call_that_carries_nothing_is_no_use_and_one_that_does_is(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        spare = there.stub.Engine(metadata=there.metadata())
        await spare.wait_for_connection()
        await until(lambda: there.engine.connections >= 2)
        unattended = await there.call((UNATTENDED_KEY, "1"))
        await unattended.write(Piece(data=b"seen"))
        assert (await unattended.read()).data == b"seen"
        assert there.session.calls.counting == 0
        await spare.write(Piece(data=b"ECHO\n"))
        await until(lambda: there.session.calls.counting == 1)
        assert not there.session.activity().HasField("pauses_at")
        spare.cancel()
        await until(lambda: there.session.calls.counting == 0)
        unattended.cancel()


@pytest.mark.parametrize("kind", ["Engine", "Port", "Follow", "Diagnose"])
async def test_who_may_not_use_a_session_is_refused_everything(tmp_path, monkeypatch, kind):
    async with world(tmp_path, monkeypatch) as there:
        for member, session_id in (("bob", ID), ("ann", "b" * 16), ("ann", "")):
            metadata = there.metadata(member, session_id)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if kind == "Diagnose":
                    await there.stub.Diagnose(DiagnoseRequest(), metadata=metadata)
                elif kind == "Follow":
                    await there.stub.Follow(FollowRequest(), metadata=metadata).read()
                else:
                    await getattr(there.stub, kind)(metadata=metadata).read()
            assert reason(caught.value) == "NOT_FOUND"


async def test_sharing_lets_a_member_in_and_its_end_cuts_open_calls(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        there.sessions.share(ID, ["bob"])
        call = await there.call(member="bob")
        await call.write(Piece(data=b"hello"))
        assert (await call.read()).data == b"hello"
        following = there.stub.Follow(FollowRequest(), metadata=there.metadata("bob"))
        await following.read()
        own = await there.call()
        await own.write(Piece(data=b"mine"))
        assert (await own.read()).data == b"mine"
        there.sessions.share(ID, [])
        for open_call in (call, following):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await open_call.read() is not grpc.aio.EOF:
                    pass
            assert reason(caught.value) == "FORBIDDEN"
        await own.write(Piece(ended=True))
        assert await read_all(own) == b"the end"


async def test_the_end_of_a_session_ends_calls_that_take_nothing(tmp_path, monkeypatch):
    for module in (calls, service):
        monkeypatch.setattr(module, "END_SECONDS", 0.3)
    async with world(tmp_path, monkeypatch) as there:
        call = there.stub.Engine(metadata=there.metadata())
        await call.write(Piece(data=b"FLOOD\n"))
        sent = 0
        while there.session.sent_bytes != sent or not sent:
            sent = there.session.sent_bytes
            await asyncio.sleep(0.2)
        await there.sessions.stop(ID, "its owner ended it")
        await until(lambda: there.session.calls.open_calls == 0)
        with pytest.raises(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "its owner ended it" in await call.details()


async def test_a_paused_session_is_woken_by_the_first_bytes_and_not_by_spare_calls(
    tmp_path, monkeypatch
):
    async with world(tmp_path, monkeypatch, session_idle=0.3) as there:
        before = there.stub.Engine(metadata=there.metadata())
        await until(lambda: there.session.state == PAUSED)
        with pytest.raises(grpc.aio.AioRpcError):
            while await before.read() is not grpc.aio.EOF:
                pass
        spare = there.stub.Engine(metadata=there.metadata())
        watcher = await there.call((UNATTENDED_KEY, "1"))
        await spare.wait_for_connection()
        await asyncio.sleep(0.3)
        assert there.session.state == PAUSED
        await spare.write(Piece(data=b"ECHO\nhello"))
        assert (await spare.read()).data == b"hello"
        assert there.host.woken == ["e1"]
        await watcher.write(Piece(data=b"seen"))
        assert (await watcher.read()).data == b"seen"
        await asyncio.sleep(0.5)
        # In use while the spare call is.
        assert there.session.state != PAUSED
        spare.cancel()
        await until(lambda: there.session.state == PAUSED)


async def test_calls_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "MAX_CALLS", 1)
    async with world(tmp_path, monkeypatch) as there:
        call = await there.call()
        await call.write(Piece(data=b"x"))
        assert (await call.read()).data == b"x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await there.stub.Engine(metadata=there.metadata()).read()
        assert reason(caught.value) == "QUOTA_EXCEEDED"
        call.cancel()


async def test_calls_that_take_nothing_hold_little_together(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "SESSION_BYTES", 1 << 20)
    count = 20
    async with world(tmp_path, monkeypatch) as there:
        room = there.session.calls.room
        opened = [there.stub.Engine(metadata=there.metadata()) for _ in range(count)]
        for call in opened:
            await call.write(Piece(data=b"FLOOD\n"))
            await call.read()
        # One that is taken goes on meanwhile.
        size = 0
        while size < 4 << 20:
            size += len((await opened[0].read()).data)
        assert room.held <= (1 << 20) + count * 4 * MIN_PIECE
        for call in opened:
            call.cancel()
        await until(lambda: room.held == 0)


async def test_fifty_calls_that_wait_leave_a_transfer_its_large_pieces(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        waiting = [await there.call() for _ in range(50)]
        for call in waiting:
            await call.write(Piece(data=b"x"))
            await call.read()
        assert there.session.calls.open_calls == len(waiting)
        assert there.session.calls.room.piece() == MAX_PIECE
        for call in waiting:
            call.cancel()


async def test_a_piece_that_is_too_large_is_refused(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        call = await there.call()
        await call.write(Piece(data=bytes((1 << 20) + 1)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert reason(caught.value) == "USAGE"


async def test_ports_are_reached_over_both_loopbacks_and_half_closed(tmp_path, monkeypatch):
    async def serve(reader, writer):
        writer.write(b"got " + await reader.read())
        writer.close()

    async with world(tmp_path, monkeypatch) as there:
        for address in ("127.0.0.1", "::1"):
            server = await asyncio.start_server(serve, address, 0)
            async with server:
                port = server.sockets[0].getsockname()[1]
                call = there.stub.Port(metadata=there.metadata())
                await call.write(PortRequest(open=PortOpen(port=port)))
                await call.write(PortRequest(piece=Piece(data=b"all")))
                await call.write(PortRequest(piece=Piece(ended=True)))
                assert await read_all(call) == b"got all"
                assert await call.read() is grpc.aio.EOF
                assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("wish", "wanted"),
    [
        (PortOpen(port=80, host="192.0.2.1"), "FORBIDDEN"),
        (PortOpen(port=80, host="example.com"), "VALUE_INVALID"),
        (PortOpen(port=0), "VALUE_INVALID"),
        (None, "USAGE"),
    ],
)
async def test_ports_elsewhere_are_refused(tmp_path, monkeypatch, wish, wanted):
    async with world(tmp_path, monkeypatch) as there:
        call = there.stub.Port(metadata=there.metadata())
        await call.write(PortRequest(open=wish) if wish else PortRequest(piece=Piece()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert reason(caught.value) == wanted


async def test_a_port_where_nobody_listens_is_told(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with world(tmp_path, monkeypatch) as there:
        call = there.stub.Port(metadata=there.metadata())
        await call.write(PortRequest(open=PortOpen(port=port)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert reason(caught.value) == "NOT_FOUND"


async def test_datagrams_pass_and_a_silent_peer_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.sessions.datagrams.IDLE_SECONDS", 1.5)
    async with world(tmp_path, monkeypatch) as there:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.setblocking(False)
            loop = asyncio.get_running_loop()
            call = there.stub.Datagrams(metadata=there.metadata())
            wish = PortOpen(port=server.getsockname()[1])
            await call.write(PortRequest(open=wish))
            await call.write(PortRequest(piece=Piece(data=b"ping")))
            data, peer = await loop.sock_recvfrom(server, 100)
            assert data == b"ping"
            await loop.sock_sendto(server, b"pong", peer)
            await loop.sock_sendto(server, b"", peer)
            assert (await call.read()).data == b"pong"
            assert (await call.read()).data == b""
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK


async def test_followers_hear_the_state_what_is_done_and_the_end(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        following = there.stub.Follow(FollowRequest(), metadata=there.metadata())
        first = await following.read()
        assert first.state == SessionState.SESSION_STATE_RUNNING
        assert first.activity.HasField("pauses_at")
        assert 28_000 < first.remaining.seconds <= 28_800
        there.engine.run(3)
        while (news := await following.read()).activity.running_containers != 3:
            pass
        assert not news.activity.HasField("pauses_at")
        stopping = asyncio.ensure_future(there.sessions.stop(ID, "enough"))
        states = []
        while (news := await following.read()) is not grpc.aio.EOF:
            states.append(news.state)
            last = news
        await stopping
        assert last.state == SessionState.SESSION_STATE_ENDED
        assert last.reason == "enough"


async def test_a_diagnosis_says_nothing_of_what_members_put_in(tmp_path, monkeypatch):
    async with world(tmp_path, monkeypatch) as there:
        there.engine.log.write_text(
            'time="2026-01-01T00:00:00Z" level=error msg="pull of registry.corp/team/app:v1 '
            'failed" error="denied: secret-token" container=0123456789abcdef\n'
        )
        texts = (await there.stub.Diagnose(DiagnoseRequest(), metadata=there.metadata())).texts
        assert set(texts) == {
            "session.json", "engine-version.json", "engine-info.json", "engine.log"
        }  # fmt: skip
        assert '"Version": "29.0.0"' in texts["engine-version.json"]
        everything = "".join(texts.values())
        for secret in ("a secret", "registry.corp", "secret-token", "0123456789abcdef"):
            assert secret not in everything
        assert "level=error" in texts["engine.log"]
        assert "pull of" in texts["engine.log"]
