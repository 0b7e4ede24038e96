"""Lists of blobs that a collection is about to delete, as their writer and their readers see them.

A list is in the store before its collector looks for leases one last time. So whoever has a lease
and then sees no list that names its blobs is seen by every collector that could delete them.
"""

from __future__ import annotations

import asyncio
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.collection.documents import (
    MAX_DOCUMENT_BYTES,
    CondemnedDocument,
    UnknownDocumentError,
)
from offload_cache.collection.timing import (
    CONDEMNED_RENEW_SECONDS,
    CONDEMNED_SECONDS,
    REQUEST_SECONDS,
)
from offload_cache.keys import kind_prefix, named_key
from offload_core.errors import NotFoundError, UsageError, find_offload_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable
    from datetime import datetime
    from types import TracebackType

    from offload_cache.objectstore import ObjectStore

_log = structlog.get_logger(__name__)

_MAX_LISTS = 1_000


async def is_condemned(
    objects: ObjectStore,
    project_id: str,
    digests: Collection[str],
    now: Callable[[], Awaitable[datetime]],
) -> bool:
    """Whether a list that still counts names one of some blobs.

    Args:
        objects: the shared store.
        project_id: the project.
        digests: of blobs, and of manifests of images.
        now: returns the time by the store's clock, or an earlier one; rarely asked.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    prefix = kind_prefix(project_id, "condemned")
    lists = await objects.list_objects(prefix, limit=_MAX_LISTS)
    if not lists:
        return False
    at = await now()
    for info in lists:
        try:
            data = await objects.read_bytes(info.key, max_bytes=MAX_DOCUMENT_BYTES)
            document = CondemnedDocument.from_bytes(data)
        except NotFoundError:
            continue  # its collection is over
        except UnknownDocumentError:
            return True
        except UsageError as error:
            if info.modified_at + timedelta(seconds=CONDEMNED_SECONDS) > at:
                _log.warning("cache.condemned.damaged", key=info.key, cause=error.message)
                return True
            continue
        over = info.modified_at + timedelta(seconds=document.seconds) <= at
        if not over and not document.blobs.union(document.images).isdisjoint(digests):
            return True
    return False


class CondemnedList:
    """One list while its collector works; an async context manager that removes it at the end.

    After a crash it stays until its time is over: deletions that are under way may still happen.
    """

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        document: CondemnedDocument,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._key = named_key(project_id, "condemned", secrets.token_hex(8))
        self._document = document
        self._clock = clock
        self._renew_at = 0.0
        self._until = 0.0

    async def __aenter__(self) -> Self:
        await self._write()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # With an error a deletion may be under way whose answer was not seen: the list stays.
        if kind is None:
            await self._objects.delete(self._key)

    async def _write(self) -> None:
        started = self._clock()
        self._renew_at = started + CONDEMNED_RENEW_SECONDS
        await self._objects.write_bytes(self._key, self._document.to_bytes())
        self._until = started + CONDEMNED_SECONDS - REQUEST_SECONDS

    async def may_delete(self) -> bool:
        """Whether a deletion that is sent now is covered; renews the list where it is time.

        A list that ran out is not renewed: publications may have stopped waiting for it.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        if self._renew_at <= self._clock() < self._until:
            before = self._until
            await self._write()
            if self._clock() >= before:
                self._until = before
        return self._clock() < self._until


async def delete_each(
    objects: ObjectStore,
    keys: Iterable[str],
    allowed: Callable[[], Awaitable[bool]],
    *,
    parallel: int = 4,
) -> int:
    """Delete objects as long as `allowed` says so before each; return how many.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    pending = iter(list(keys))
    deleted = 0

    async def work() -> None:
        nonlocal deleted
        for key in pending:
            if not await allowed():
                return
            await objects.delete(key)
            deleted += 1

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise find_offload_error(failed) or failed from None
    return deleted
