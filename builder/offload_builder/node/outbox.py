"""Messages on their way to one client: bounded, and never in the way of an ending."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload_proto.v1.node_service_pb2 import RunResponse

OUTBOX_MESSAGES = 64


class Outbox:
    """One reader, any number of writers; a client that does not read holds up its own build only.

    Attributes:
        taken: messages that the reader took; shows whether it is alive.
    """

    def __init__(self, limit: int = OUTBOX_MESSAGES) -> None:
        self._limit = limit
        self._messages: deque[RunResponse] = deque()
        self._room = asyncio.Event()
        self._news = asyncio.Event()
        self._finished = False
        self._dropped = False
        self.taken = 0

    async def put(self, message: RunResponse) -> None:
        """Queue a message; waits while too many are unread. After `drop` it is thrown away."""
        while len(self._messages) >= self._limit and not self._dropped:
            self._room.clear()
            await self._room.wait()
        if not self._dropped:
            self._messages.append(message)
            self._news.set()

    def put_now(self, message: RunResponse) -> None:
        """Queue a message beyond the bound: for the few that must not be lost or late."""
        if not self._dropped:
            self._messages.append(message)
            self._news.set()

    async def get(self) -> RunResponse | None:
        """Return the next message; None after the last one."""
        while not self._messages:
            if self._finished:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        self.taken += 1
        self._room.set()
        return message

    def finish(self) -> None:
        """Say that no more messages come; the reader gets what is queued, then None."""
        self._finished = True
        self._news.set()

    def drop(self) -> None:
        """Say that nobody reads any more; nobody waits in `put` from now on."""
        self._dropped = True
        self._messages.clear()
        self._room.set()
        self.finish()
