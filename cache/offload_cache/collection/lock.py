"""The lock object that makes one node of a pool the collector.

It saves work: no deletion is safe because of the lock, and two holders at a time do no harm.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import orjson
import structlog

from offload_cache.collection.timing import (
    LOCK_MARGIN_SECONDS,
    LOCK_RENEW_SECONDS,
    LOCK_SECONDS,
)
from offload_core.errors import CacheUnavailableError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.collection.listing import StoreClock
    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)

LOCK_KEY = "pool/collector"
_MAX_BYTES = 4096
_RETRY_SECONDS = 15.0


class CollectionLock:
    """One attempt to be the collector."""

    def __init__(
        self, objects: ObjectStore, owner: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._objects = objects
        self._document = orjson.dumps({"owner": owner, "nonce": secrets.token_hex(8)})
        self._clock = clock
        self._until = float("-inf")

    @property
    def held(self) -> bool:
        """Whether the lock is ours for long enough to go on."""
        return self._clock() < self._until

    async def acquire(self, now: StoreClock) -> bool:
        """Take the lock if nobody has it; one that its owner did not renew counts for nobody's.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        started = self._clock()
        created = await self._objects.create_bytes(LOCK_KEY, self._document)
        if not created:
            info = await self._objects.stat(LOCK_KEY)
            if info is not None and info.modified_at + timedelta(seconds=LOCK_SECONDS) > now.now():
                return False
            await self._objects.delete(LOCK_KEY)
            started = self._clock()
            await self._objects.create_bytes(LOCK_KEY, self._document)
        # Also where the store has no conditional writes, or repeated a write whose answer was lost.
        if not await self._is_ours():
            return False
        self._until = started + LOCK_SECONDS - LOCK_MARGIN_SECONDS
        return True

    async def _is_ours(self) -> bool:
        try:
            return await self._objects.read_bytes(LOCK_KEY, max_bytes=_MAX_BYTES) == self._document
        except NotFoundError:
            return False

    async def keep(self) -> None:
        """Renew the lock until it is lost or the caller has enough."""
        pause_seconds = LOCK_RENEW_SECONDS
        while self.held:
            await asyncio.sleep(pause_seconds)
            try:
                renewed = await self._renew()
            except NotFoundError:
                self._until = float("-inf")
                _log.warning("cache.collection.lock.lost")
                return
            pause_seconds = LOCK_RENEW_SECONDS if renewed else _RETRY_SECONDS

    async def _renew(self) -> bool:
        started = self._clock()
        try:
            if not await self._is_ours():
                raise NotFoundError("another node has the lock of the collection")
            await self._objects.write_bytes(LOCK_KEY, self._document)
        except CacheUnavailableError:
            return False
        self._until = started + LOCK_SECONDS - LOCK_MARGIN_SECONDS
        return True

    async def release(self) -> None:
        """Give the lock back if it is still ours.

        Raises:
            CacheUnavailableError: the store does not answer; the lock runs out by itself.
        """
        if self.held and await self._is_ours():
            self._until = float("-inf")
            await self._objects.delete(LOCK_KEY)
