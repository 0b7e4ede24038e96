"""Runs a collection now and then on whichever node of the pool comes first."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.collection.listing import StoreClock
from offload_cache.collection.report import REPORT_KEY
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from offload_cache.collection.collector import Collector
    from offload_cache.collection.report import CollectionReport
    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)

_RETRY_SECONDS = 600.0
"""After a run that failed, or while another node runs one."""
_JITTER_SHARE = 0.1


class CollectionLoop:
    """Collects when the pool's last collection is old enough; an async context manager.

    Args:
        objects: the shared store.
        collector: does the work.
        every_seconds: between two collections of the pool.
    """

    def __init__(self, objects: ObjectStore, collector: Collector, every_seconds: float) -> None:
        self._objects = objects
        self._collector = collector
        self._every_seconds = every_seconds
        self._tasks = TaskSet(on_error=self._crashed)
        self.last: CollectionReport | None = None
        """What this node did last."""

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), name="cache-collection")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("cache.collection.crashed", task=name, error=repr(error))

    async def _run(self) -> None:
        wait_seconds = 0.0
        while True:
            # Nodes that were started together shall not all ask at once.
            spread = self._every_seconds * _JITTER_SHARE
            await asyncio.sleep(wait_seconds + random.uniform(0, spread))  # noqa: S311
            try:
                wait_seconds = await self._due_in()
                if wait_seconds <= 0:
                    self.last = await self._collector.run()
                    wait_seconds = min(_RETRY_SECONDS, self._every_seconds)
            except CacheUnavailableError as error:
                _log.info("cache.collection.failed", cause=error.message)
                wait_seconds = min(_RETRY_SECONDS, self._every_seconds)
            except Exception as error:  # noqa: BLE001 - the next run may do better
                _log.error("cache.collection.crashed", error=repr(error))
                wait_seconds = self._every_seconds

    async def _due_in(self) -> float:
        """Return in how many seconds a collection is due, by the store's clock."""
        info = await self._objects.stat(REPORT_KEY)
        if info is None:
            return 0.0
        now = (await StoreClock.read(self._objects)).now()
        due = info.modified_at + timedelta(seconds=self._every_seconds)
        return max(0.0, (due - now).total_seconds())
