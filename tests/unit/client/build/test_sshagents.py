"""The client's end: agents and key files, and what a node may have of them."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from offload_client.build.secretoptions import parse_agents
from offload_client.build.sshagents import SshAgents, SshStreams
from offload_client.invocation import Invocation
from offload_core.errors import InvalidValueError
from offload_core.sshagent import FAILURE, FrameReader, frame
from offload_proto.v1.node_service_pb2 import RunRequest, SshData, SshOpen

LIST, ADD, EXTENSION = frame(11), frame(17, b"key"), frame(27, b"x")
KEYS = frame(12, b"\0\0\0\0")


class Agent:
    """Takes requests on a socket and says that there are no keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        while data := await reader.read(4096):
            for request in frames.feed(data):
                self.seen.append(request)
                writer.write(KEYS)
        writer.close()


def agents(folder: Path, *given: str, **environment: str) -> SshAgents:
    invocation = Invocation([], folder, environment, 0, io.StringIO(), io.StringIO())
    return SshAgents(invocation, parse_agents(given))


class Node:
    """What the node hears."""

    def __init__(self, found: SshAgents) -> None:
        self.heard: asyncio.Queue[SshData] = asyncio.Queue()
        self.streams = SshStreams(found, self._take)

    async def _take(self, message: RunRequest) -> None:
        self.heard.put_nowait(message.ssh_data)

    async def next(self) -> SshData:
        return await asyncio.wait_for(self.heard.get(), 5)


async def test_only_reading_requests_reach_the_agent(tmp_path):
    agent = Agent(tmp_path / "s")
    server = await asyncio.start_unix_server(agent.serve, agent.path)
    async with server:
        node = Node(agents(tmp_path, "default", SSH_AUTH_SOCK="s"))
        node.streams.open(SshOpen(stream_id=1, ssh_id="default"))
        for request, reply in ((ADD, FAILURE), (LIST, KEYS), (EXTENSION, FAILURE)):
            node.streams.take(SshData(stream_id=1, data=request))
            assert (await node.next()).data == reply
        node.streams.take(SshData(stream_id=1, end=True))
        last = await node.next()
        assert last.end and not last.error
        assert agent.seen == [LIST]
        await node.streams.close()


async def test_agents_that_were_not_given_or_do_not_answer_end_the_stream_with_a_sentence(tmp_path):
    agent = Agent(tmp_path / "s")
    server = await asyncio.start_unix_server(agent.serve, agent.path)
    node = Node(agents(tmp_path, "a=s"))
    server.close()
    await server.wait_closed()
    node.streams.open(SshOpen(stream_id=1, ssh_id="other"))
    assert "unset ssh forward key other" in (await node.next()).error
    node.streams.open(SshOpen(stream_id=2, ssh_id="a"))
    last = await node.next()
    assert last.end and "the SSH agent cannot be used" in last.error
    await node.streams.close()


async def test_node_that_sends_more_than_a_request_at_a_time_is_cut_off(tmp_path):
    agent = Agent(tmp_path / "s")
    server = await asyncio.start_unix_server(agent.serve, agent.path)
    async with server:
        node = Node(agents(tmp_path, "a=s"))
        node.streams.open(SshOpen(stream_id=1, ssh_id="a"))
        for _ in range(40):
            node.streams.take(SshData(stream_id=1, data=LIST))
        while not (last := await node.next()).end:
            pass
        assert "too much at once" in last.error
        await node.streams.close()


def test_agent_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InvalidValueError, match="SSH_AUTH_SOCK is not set") as caught:
        agents(tmp_path, "default")
    assert "ssh-add" in caught.value.hint
    (tmp_path / "k").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    with pytest.raises(InvalidValueError, match="failed to parse k"):
        agents(tmp_path, "a=k")
