"""Complete listings of the shared store, and its clock."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from offload_cache.keys import check_project_id
from offload_core.errors import CacheUnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.objectstore import ObjectInfo, ObjectStore

_PAGE = 10_000
_PAGE_SECONDS = 120.0
_PROJECTS = "projects/"
_CLOCK = "pool/clock"


async def list_all(objects: ObjectStore, prefix: str) -> list[ObjectInfo]:
    """Return every object whose key begins with `prefix`, in key order.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    found: list[ObjectInfo] = []
    start_after = ""
    while True:
        page = await objects.list_objects(
            prefix, limit=_PAGE, start_after=start_after, timeout=_PAGE_SECONDS
        )
        found += page
        if len(page) < _PAGE:
            return found
        start_after = page[-1].key


async def list_projects(objects: ObjectStore) -> list[str]:
    """Return the projects that have anything in the store, one request for each.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    found: list[str] = []
    start_after = ""
    while True:
        page = await objects.list_objects(
            _PROJECTS, limit=1, start_after=start_after, timeout=_PAGE_SECONDS
        )
        if not page:
            return found
        project = page[0].key.removeprefix(_PROJECTS).partition("/")[0]
        with contextlib.suppress(UsageError):  # nothing of ours
            found.append(check_project_id(project))
        # "0" is the character after "/": what follows every key below this project.
        start_after = f"{_PROJECTS}{project}0"


class StoreClock:
    """The time by the store's clock, which dates all objects; nodes' clocks need not agree."""

    def __init__(self, at: datetime, clock: Callable[[], float]) -> None:
        self._at = at
        self._clock = clock
        self._read = clock()

    @classmethod
    async def read(
        cls, objects: ObjectStore, clock: Callable[[], float] = time.monotonic
    ) -> StoreClock:
        """Learn the time: the store dates a small object.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        await objects.write_bytes(_CLOCK, b"")
        info = await objects.stat(_CLOCK)
        if info is None:
            raise CacheUnavailableError("the shared cache lost an object that it had just taken")
        return cls(info.modified_at, clock)

    def now(self) -> datetime:
        """Return the time, in UTC; it is never ahead of the store's by more than a drift."""
        return (self._at + timedelta(seconds=self._clock() - self._read)).astimezone(UTC)
