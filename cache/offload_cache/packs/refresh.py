"""Keeps a node's catalogue of packs in step with the shared store."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from offload_cache.keys import pack_key, pack_prefix
from offload_cache.packs.layout import (
    MAX_INDEX_BYTES,
    DamagedPackError,
    decode_index,
)
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

    from offload_cache.objectstore import ObjectStore
    from offload_cache.packs.catalog import PackCatalog

_log = structlog.get_logger(__name__)

_APART_SECONDS = 2.0
_LIST_SECONDS = 10.0
_READ_SECONDS = 10.0
_WHOLE_SECONDS = 3600.0
"""A complete listing this often shows which packs were deleted."""
_LATE_SECONDS = 1800.0
"""Names hold the time by a node's clock, and an index is written after it got its name."""
_PARALLEL_READS = 4
_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0
MAX_PACKS = 100_000


class CatalogRefresh:
    """Reads the indexes of packs that other nodes have written; one run at a time."""

    def __init__(
        self, objects: ObjectStore, project_id: str, catalog: PackCatalog, threads: Executor
    ) -> None:
        self._objects = objects
        self._project_id = project_id
        self._catalog = catalog
        self._threads = threads
        self._tasks = TaskSet()
        self._running: asyncio.Task[None] | None = None
        self._started_at = -_APART_SECONDS
        self._retry_at = 0.0
        self._answered = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def close(self) -> None:
        """End a run that is under way."""
        await self._tasks.close()

    async def refresh(self, seconds: float) -> bool:
        """Wait until news of the shared store are in, at most `seconds`.

        Callers share a run; it goes on when they have stopped waiting. All together wait at most
        `seconds` for one run, so a store that hangs costs a build that once. The store is not
        asked again within two seconds, nor soon after a failure.

        Returns:
            Whether the store answered when it was asked last.
        """
        now = time.monotonic()
        running = self._running
        if running is None or running.done():
            if (
                now < max(self._started_at + _APART_SECONDS, self._retry_at)
                or not self._objects.reachable
            ):
                return self._answered
            self._started_at = now
            running = self._running = self._tasks.start(self._run(), name="context-catalog")
        left = self._started_at + seconds - now
        if left > 0:
            await asyncio.wait([running], timeout=left)
        return self._answered

    async def _run(self) -> None:
        try:
            await self._read_news()
        except CacheUnavailableError as error:
            self._hold_off(error.message)
        except Exception as error:  # noqa: BLE001 - a fault of the store is a miss
            self._hold_off(repr(error))
        else:
            self._pause_seconds = _FIRST_PAUSE_SECONDS

    def _hold_off(self, cause: str) -> None:
        self._answered = False
        self._retry_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
        _log.info("context.catalog.refresh.failed", project_id=self._project_id, cause=cause)

    async def _read_news(self) -> None:
        loop = asyncio.get_running_loop()
        known = await loop.run_in_executor(self._threads, self._catalog.names)
        listed_at = self._catalog.listed_at
        whole = not listed_at or time.monotonic() > listed_at + _WHOLE_SECONDS
        prefix = pack_prefix(self._project_id, "index")
        self._answered = False
        start_after = "" if whole else prefix + _name_at(time.time() - _LATE_SECONDS)
        found = await self._objects.list_objects(
            prefix, limit=MAX_PACKS, start_after=start_after, timeout=_LIST_SECONDS
        )
        self._answered = True
        listed = {info.key.removeprefix(prefix) for info in found}
        # Newest first: when time is short, what was sent last is what is asked for next.
        news = sorted(listed - known, reverse=True)
        if news:
            await self._take_in(news)
        if whole:
            gone = known - listed
            if gone:
                await loop.run_in_executor(self._threads, self._catalog.forget, gone)
            self._catalog.mark_listed()

    async def _take_in(self, names: list[str]) -> None:
        loop = asyncio.get_running_loop()
        # Blobs of the packs that were known before move to the news: the older packs go first.
        before = await loop.run_in_executor(self._threads, self._catalog.next_frame)
        pending = iter(names)
        readers = [
            self._take_some(pending, before) for _ in range(min(_PARALLEL_READS, len(names)))
        ]
        started = time.monotonic()
        results = await asyncio.gather(*readers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        _log.debug(
            "context.catalog.refreshed",
            project_id=self._project_id,
            packs=len(names),
            seconds=round(time.monotonic() - started, 3),
        )

    async def _take_some(self, names: Iterator[str], before: int) -> None:
        for name in names:
            try:
                data = await self._objects.read_bytes(
                    pack_key(self._project_id, "index", name),
                    max_bytes=MAX_INDEX_BYTES,
                    timeout=_READ_SECONDS,
                )
            except NotFoundError:
                continue  # deleted since the listing
            except UsageError:
                continue  # nothing of ours
            await asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, name, data, before
            )

    def _decode(self, name: str, data: bytes, before: int) -> None:
        try:
            index = decode_index(data)
        except DamagedPackError as error:
            _log.warning("context.pack.damaged", pack=name, cause=str(error))
            self._catalog.reject(name)
        else:
            self._catalog.add(name, index, replace_before=before)


def _name_at(seconds: float) -> str:
    """Return what sorts before the names that were made after a time."""
    return f"{int(seconds * 1000):012x}"
