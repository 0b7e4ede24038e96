"""The node's end of a connection to a client's SSH agent."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node import sshagents
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.outbox import Outbox
from offload_builder.node.sshagents import ClientAgents
from offload_core.errors import (
    AccessDeniedError,
    NodeLostError,
    OffloadError,
    QuotaExceededError,
    UsageError,
)
from offload_core.sshagent import FAILURE, frame
from offload_proto.v1.node_service_pb2 import RunResponse, SshData

LIST = frame(11)


async def said(link: ClientLink) -> RunResponse:
    message = await asyncio.wait_for(link.outbox.get(), 5)
    assert message is not None
    return message


async def opened(link: ClientLink) -> int:
    """Return the number of the stream whose opening was said."""
    return (await said(link)).ssh_open.stream_id


async def test_request_and_reply_travel_in_pieces_and_the_end_is_told():
    link = ClientLink()
    agents = ClientAgents(link, ["default"])
    assert agents.has("default") and not agents.has("other")
    async with agents.connect("default") as connection:
        number = await opened(link)
        asking = asyncio.ensure_future(connection.ask(LIST))
        assert (await said(link)).ssh_data.data == LIST
        for piece in (FAILURE[:2], FAILURE[2:]):
            link.ssh_data(SshData(stream_id=number, data=piece))
        assert await asking == FAILURE
    assert (await said(link)).ssh_data.end
    # What comes late is of no interest.
    link.ssh_data(SshData(stream_id=number, data=FAILURE))


async def test_reply_that_nobody_asked_for_and_nonsense_are_refused():
    link = ClientLink()
    async with ClientAgents(link, ["a"]).connect("a"):
        number = await opened(link)
        with pytest.raises(UsageError, match="not asked for"):
            link.ssh_data(SshData(stream_id=number, data=FAILURE))
        with pytest.raises(UsageError, match="not the protocol"):
            link.ssh_data(SshData(stream_id=number, data=b"\xff\xff\xff\xff"))


async def test_agent_that_the_client_cannot_reach_ends_the_connection_and_is_told_once():
    link = ClientLink()
    agents = ClientAgents(link, ["a"])
    for told in (True, False):
        with pytest.raises(AccessDeniedError, match="no such socket"):
            async with agents.connect("a") as connection:
                number = await opened(link)
                asking = asyncio.ensure_future(connection.ask(LIST))
                await said(link)
                link.ssh_data(SshData(stream_id=number, end=True, error="no such socket"))
                await asking
        if told:
            assert "SSH agent a: no such socket" in (await said(link)).notice.text


async def test_client_that_goes_away_leaves_no_step_waiting():
    link = ClientLink()
    with pytest.raises(NodeLostError):
        async with ClientAgents(link, ["a"]).connect("a") as connection:
            await opened(link)
            asking = asyncio.ensure_future(connection.ask(LIST))
            await said(link)
            link.lose(NodeLostError("the client went away"))
            await asking
    with pytest.raises(OffloadError):
        async with ClientAgents(link, ["a"]).connect("a"):
            pass


async def test_connections_of_a_build_are_bounded(monkeypatch):
    monkeypatch.setattr(sshagents, "MAX_STREAMS", 1)
    link = ClientLink()
    agents = ClientAgents(link, ["a"])
    async with agents.connect("a"):
        with pytest.raises(QuotaExceededError):
            async with agents.connect("a"):
                pass
    async with agents.connect("a"):
        pass


async def test_client_that_takes_over_leaves_no_step_waiting():
    link = ClientLink()
    agents = ClientAgents(link, ["a"])
    with pytest.raises(NodeLostError, match="went away"):
        async with agents.connect("a") as connection:
            await opened(link)
            asking = asyncio.ensure_future(connection.ask(LIST))
            await said(link)
            link.attach(Outbox())
            await asyncio.wait_for(asking, 5)


async def test_step_that_wants_an_agent_while_the_client_is_away_waits_for_it():
    link = ClientLink()
    link.detach(link.outbox)

    async def ask() -> bytes:
        async with ClientAgents(link, ["a"]).connect("a") as connection:
            return await connection.ask(LIST)

    asking = asyncio.ensure_future(ask())
    await asyncio.sleep(0.05)
    link.attach(Outbox())
    number = await opened(link)
    assert (await said(link)).ssh_data.data == LIST
    link.ssh_data(SshData(stream_id=number, data=FAILURE))
    assert await asyncio.wait_for(asking, 5) == FAILURE


async def test_step_waits_for_no_client_that_is_lost():
    link = ClientLink()
    link.detach(link.outbox)
    connecting = asyncio.ensure_future(ClientAgents(link, ["a"]).connect("a").__aenter__())
    await asyncio.sleep(0.05)
    link.lose(NodeLostError("it is gone"))
    with pytest.raises(NodeLostError, match="it is gone"):
        await asyncio.wait_for(connecting, 5)
