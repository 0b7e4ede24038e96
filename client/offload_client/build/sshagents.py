"""--ssh: the agents that steps of a build may ask through the node.

As buildx does, only reading requests reach an agent: a step can list keys and have something
signed, and can neither add, remove nor lock keys.
Source: BuildKit's session/sshforward/sshprovider.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.build.keyring import Keyring
from offload_core.aio import TaskSet
from offload_core.errors import InvalidValueError, OffloadError, UsageError
from offload_core.sshagent import FAILURE, READING_REQUESTS, FrameReader, frame_kind
from offload_proto.v1.node_service_pb2 import RunRequest, SshData

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
    from pathlib import Path

    from offload_client.build.secretoptions import AgentOption
    from offload_client.invocation import Invocation
    from offload_proto.v1.node_service_pb2 import SshOpen

    Send = Callable[[RunRequest], Awaitable[None]]

AGENT_VARIABLE = "SSH_AUTH_SOCK"
CONNECT_SECONDS = 2.0
REPLY_SECONDS = 120.0
"""An agent may ask its user to touch a key or to confirm."""
MAX_STREAMS = 64
_QUEUED_MESSAGES = 16
"""The node sends a request at a time, so a good one never has more than one message here."""


@dataclass(frozen=True)
class _Agent:
    """One --ssh: a socket, or keys."""

    socket: Path | None
    keys: Keyring | None


class SshAgents:
    """The agents of one build; streams of one connection to the node are in `SshStreams`."""

    def __init__(self, invocation: Invocation, options: Sequence[AgentOption]) -> None:
        """Look whether they are there, and load keys from files.

        Raises:
            InvalidValueError: a socket or key is not there or not usable.
            ConfigError: the library for keys is not installed.
        """
        self._invocation = invocation
        self._agents = {option.id: self._agent(option) for option in options}

    @property
    def ids(self) -> list[str]:
        """Names of the agents."""
        return list(self._agents)

    def agent(self, agent_id: str) -> _Agent | None:
        """Return what a name means, or None."""
        return self._agents.get(agent_id)

    def _agent(self, option: AgentOption) -> _Agent:
        paths = [path for path in option.paths if path]
        if not paths:
            own = self._invocation.environment.get(AGENT_VARIABLE, "")
            if not own:
                raise InvalidValueError(
                    f"invalid empty ssh agent socket: --ssh {option.id} needs your SSH agent, but "
                    f"{AGENT_VARIABLE} is not set",
                    hint="start an agent with `eval $(ssh-agent)` and `ssh-add`, "
                    f"or give a key: --ssh {option.id}=PATH",
                )
            paths = [own]
        keys = Keyring()
        for text in paths:
            path = self._invocation.path(text)
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise InvalidValueError(
                    f"--ssh {option.id}: failed to stat {text}: {(error.strerror or '').lower()}"
                ) from error
            if stat.S_ISSOCK(mode):
                if len(paths) > 1:
                    raise InvalidValueError(
                        f"--ssh {option.id}: give one socket, or key files, and not both"
                    )
                return _Agent(path, None)
            keys.add_file(path, text)
        return _Agent(None, keys)


class SshStreams:
    """The connections of steps to agents, over one control stream."""

    def __init__(self, agents: SshAgents, send: Send) -> None:
        """Open nothing yet.

        Args:
            agents: of the build.
            send: says something to the node.
        """
        self._agents = agents
        self._send = send
        self._tasks = TaskSet()
        self._queues: dict[int, asyncio.Queue[SshData]] = {}

    def open(self, message: SshOpen) -> None:
        """Begin a stream."""
        number = message.stream_id
        if number in self._queues:
            return
        self._queues[number] = asyncio.Queue(_QUEUED_MESSAGES)
        self._tasks.start(self._run(number, message.ssh_id), name=f"ssh {number}")

    async def close(self) -> None:
        """End all streams."""
        await self._tasks.close()

    def take(self, message: SshData) -> None:
        """Take bytes of a stream; of one that is over they are thrown away."""
        queue = self._queues.get(message.stream_id)
        if queue is None:
            return
        if queue.full():
            queue.get_nowait()
            message = SshData(stream_id=message.stream_id, error="the node sent too much at once")
        queue.put_nowait(message)

    async def _run(self, number: int, agent_id: str) -> None:
        problem = ""
        try:
            agent = self._agents.agent(agent_id)
            if agent is None or len(self._queues) > MAX_STREAMS:
                raise UsageError(f"unset ssh forward key {agent_id}")
            if agent.socket is not None:
                await self._with_socket(number, agent.socket)
            elif agent.keys is not None:
                await self._with_keys(number, agent.keys)
        except OffloadError as error:
            problem = error.message
        except (OSError, TimeoutError) as error:
            what = getattr(error, "strerror", None) or "it does not answer"
            problem = f"the SSH agent cannot be used: {what}"
        finally:
            del self._queues[number]
        await self._send(RunRequest(ssh_data=SshData(stream_id=number, end=True, error=problem)))

    async def _with_keys(self, number: int, keys: Keyring) -> None:
        async with aclosing(self._requests(number)) as requests:
            async for request in requests:
                # A signature by RSA takes milliseconds.
                await self._reply(number, await asyncio.to_thread(keys.answer, request))

    async def _with_socket(self, number: int, path: Path) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
        replies = FrameReader()
        try:
            async with aclosing(self._requests(number)) as requests:
                async for request in requests:
                    if frame_kind(request) not in READING_REQUESTS:
                        await self._reply(number, FAILURE)
                        continue
                    writer.write(request)
                    async with asyncio.timeout(REPLY_SECONDS):
                        await writer.drain()
                        reply = await _next_reply(reader, replies)
                    await self._reply(number, reply)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _requests(self, number: int) -> AsyncGenerator[bytes]:
        queue, frames = self._queues[number], FrameReader()
        while True:
            message = await queue.get()
            if message.error:
                raise UsageError(message.error)
            for request in frames.feed(message.data):
                yield request
            if message.end:
                return

    async def _reply(self, number: int, data: bytes) -> None:
        await self._send(RunRequest(ssh_data=SshData(stream_id=number, data=data)))


async def _next_reply(reader: asyncio.StreamReader, frames: FrameReader) -> bytes:
    while True:
        data = await reader.read(65536)
        if not data:
            raise UsageError("the SSH agent closed the connection")
        if found := frames.feed(data):
            return found[0]
