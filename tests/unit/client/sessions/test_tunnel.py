"""A tunnel whose node cannot be reached."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import pytest
from grpc import aio

from offload_client.sessions import backoff
from offload_client.sessions import tunnel as module
from offload_client.sessions.access import NodeChannel, SessionPlace
from offload_client.sessions.tunnel import Tunnel
from offload_core.errors import GatewayUnreachableError, NodeLostError, SessionGoneError
from offload_proto.v1 import session_node_service_pb2 as pb
from offload_proto.v1 import sessions_service_pb2 as sessions_pb
from offload_proto.v1.session_node_service_pb2_grpc import (
    SessionNodeServiceServicer,
    add_SessionNodeServiceServicer_to_server,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

LOG = logging.getLogger("test")
PATIENCE = 20.0


class Access:
    """Fails in one way after the other, then for ever in the last one."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures: Sequence[BaseException] = failures
        self.calls = 0

    async def find(self, *, wake: bool) -> SessionPlace:
        failure = self.failures[min(self.calls, len(self.failures) - 1)]
        self.calls += 1
        raise failure

    async def connect(self, place: SessionPlace) -> NodeChannel:
        raise AssertionError(place)

    def give_up(self, channel: NodeChannel) -> None:
        raise AssertionError(channel)


async def test_whatever_fails_is_tried_again() -> None:
    # A cancelled call is no cancelled tunnel.
    access = Access(ValueError("nonsense"), asyncio.CancelledError(), SessionGoneError("it ended"))
    async with asyncio.timeout(PATIENCE), Tunnel(access, "a", LOG) as tunnel:
        assert await tunnel.ended == "it ended"
    assert access.calls == 3


class FlappingNode(SessionNodeServiceServicer):
    """Tells of a session and is away at once, again and again; then the session has ended."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def Follow(
        self, request: pb.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SessionNews]:
        if self.left == 0:
            yield pb.SessionNews(state=sessions_pb.SESSION_STATE_ENDED, reason="it ended")
            return
        self.left -= 1
        yield pb.SessionNews(state=sessions_pb.SESSION_STATE_RUNNING)


class AccessToOne(Access):
    """Reaches one node."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.unused: list[aio.Channel] = []

    async def find(self, *, wake: bool) -> SessionPlace:
        return SessionPlace((self.address,), "node", sessions_pb.SESSION_STATE_RUNNING)

    async def connect(self, place: SessionPlace) -> NodeChannel:
        return NodeChannel(aio.insecure_channel(self.address), time.time() + 3600)

    def give_up(self, channel: NodeChannel) -> None:
        self.unused.append(channel.channel)

    async def aclose(self) -> None:
        for channel in self.unused:
            await channel.close()


async def test_breaks_do_not_add_up_once_it_was_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # With rests that grew from one break to the next, the last would be of minutes.
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 1000.0)
    node = FlappingNode(times=12)
    server = aio.server()
    add_SessionNodeServiceServicer_to_server(node, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    access = AccessToOne(address)
    try:
        async with asyncio.timeout(PATIENCE), Tunnel(access, "a", LOG, spares=0) as tunnel:
            assert await tunnel.ended == "it ended"
    finally:
        await access.aclose()
        await server.stop(None)
    assert node.left == 0


async def test_a_clock_that_is_set_back_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "LEAST_PATIENCE", 0.1)
    access = Access(GatewayUnreachableError("the gateway is away"))
    async with asyncio.timeout(PATIENCE), Tunnel(access, "a", LOG) as tunnel:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 86400)
        with pytest.raises(NodeLostError, match="cannot be reached"):
            await tunnel.engine()
        assert 0 < tunnel.away_seconds < PATIENCE
