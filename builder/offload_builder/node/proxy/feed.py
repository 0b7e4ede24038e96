"""The progress of one build on its way to the clients that watch it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

MAX_UNREAD_BYTES = 4 << 20
"""A watcher that has so much unread holds up the daemon's stream, as it would without us."""


class _Watcher:
    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.size = 0
        self.news = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()


class StatusFeed:
    """Serialised StatusResponses of one build, for any number of watchers.

    A watcher that comes late gets what was told in the queue; BuildKit keeps the rest for no one
    either, once somebody has read it.
    """

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()
        self._before: list[bytes] = []
        self._watched = False
        self._finished = False

    def tell(self, message: bytes) -> None:
        """Pass on a message of ours at once."""
        if not message or self._finished:
            return
        if not self._watched:
            self._before.append(message)
        for watcher in self._watchers:
            watcher.messages.append(message)
            watcher.size += len(message)
            watcher.news.set()

    async def put(self, message: bytes) -> None:
        """Pass on a message of the daemon; wait for watchers that have too much unread."""
        self.tell(message)
        for watcher in list(self._watchers):
            if watcher.size > MAX_UNREAD_BYTES:
                watcher.room.clear()
                await watcher.room.wait()

    def finish(self) -> None:
        """Say that nothing follows."""
        self._finished = True
        for watcher in self._watchers:
            watcher.news.set()

    async def watch(self) -> AsyncGenerator[list[bytes]]:
        """Yield runs of messages until the end."""
        watcher = _Watcher()
        if not self._watched:
            self._watched = True
            watcher.messages, self._before = self._before, []
        self._watchers.add(watcher)
        try:
            while True:
                if watcher.messages:
                    run, watcher.messages, watcher.size = watcher.messages, [], 0
                    watcher.room.set()
                    yield run
                elif self._finished:
                    return
                else:
                    watcher.news.clear()
                    await watcher.news.wait()
        finally:
            self._watchers.discard(watcher)
            watcher.room.set()
