"""The client's SSH agents, as BuildKit's session serves them to steps."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import (
    AccessDeniedError,
    NodeLostError,
    OffloadError,
    QuotaExceededError,
    UsageError,
)
from offload_core.sshagent import FrameReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from offload_builder.node.clientlink import ClientLink
    from offload_proto.v1.node_service_pb2 import SshData

log = structlog.get_logger(__name__)

MAX_STREAMS = 64
"""Connections of one build's steps at a time."""
REPLY_SECONDS = 150.0
"""More than the client waits for its agent."""


class SshStream:
    """One connection to an agent of the client.

    One request at a time, so neither end ever has more than a frame of the other to keep.
    """

    def __init__(self, send: Callable[[bytes, bool], Coroutine[None, None, None]]) -> None:
        self._send = send
        self._frames = FrameReader()
        self._reply: asyncio.Future[bytes] | None = None
        self._error: OffloadError | None = None
        self._ended = False

    async def ask(self, request: bytes) -> bytes:
        """Return the reply to a request.

        Raises:
            OffloadError: the agent cannot be reached, or the client is gone.
        """
        if self._error is not None:
            raise self._error
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reply = reply
        try:
            await self._send(request, False)
            async with asyncio.timeout(REPLY_SECONDS):
                return await reply
        except TimeoutError:
            raise NodeLostError("the client's SSH agent did not answer") from None
        finally:
            self._reply = None
            reply.cancel()

    def take(self, message: SshData) -> None:
        """Take bytes of the client.

        Raises:
            UsageError: nothing was asked for, or it is not the protocol of an agent.
        """
        frames = self._frames.feed(message.data)
        waiting = self._reply is not None and not self._reply.done()
        if len(frames) > waiting:
            raise UsageError("the client sent a reply of an SSH agent that was not asked for")
        if frames and self._reply is not None:
            self._reply.set_result(frames[0])
        if message.error or message.end:
            self._ended = True
            self.fail(
                AccessDeniedError(message.error[:500] or "the client's SSH agent ended the session")
            )

    def fail(self, error: OffloadError) -> None:
        """End what waits, now and later; the first error holds."""
        self._error = self._error or error
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self._error)
            # Nobody may be waiting any more.
            self._reply.exception()

    async def close(self) -> None:
        """Say that no more is asked."""
        if not self._ended:
            await self._send(b"", True)


class ClientAgents:
    """Agents by the names that the client gave with --ssh."""

    def __init__(self, link: ClientLink, ids: Sequence[str]) -> None:
        self._link = link
        self._ids = frozenset(ids)
        self._open = 0
        self._told: set[str] = set()

    def has(self, agent_id: str) -> bool:
        """Return whether the client forwards an agent of a name."""
        return agent_id in self._ids

    @asynccontextmanager
    async def connect(self, agent_id: str) -> AsyncIterator[SshStream]:
        """Open a connection for as long as the block runs.

        Raises:
            OffloadError: the client is gone, its agent is not to be had, or too many are open.
        """
        if self._open >= MAX_STREAMS:
            raise QuotaExceededError(f"more than {MAX_STREAMS} connections to SSH agents are open")
        self._open += 1
        try:
            async with self._link.ssh_stream(agent_id) as stream:
                yield stream
        except OffloadError as error:
            await self._tell(agent_id, error)
            raise
        finally:
            self._open -= 1

    async def _tell(self, agent_id: str, error: OffloadError) -> None:
        """Say what the step only sees as a closed socket."""
        if error.message not in self._told and not self._link.lost:
            self._told.add(error.message)
            log.warning("ssh.agent.failed", agent=agent_id, reason=error.message)
            await self._link.notice(f"SSH agent {agent_id}: {error.message}")
