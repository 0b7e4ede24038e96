"""A node's word that its running builds still read some blobs, off the builds' critical path.

What a build is offered was listed moments ago, and a removed document protects its blobs for
another grace: so a build may begin before its lease is written. The lease is for builds that run
longer than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from offload_cache.collection.leases import Lease
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from offload_cache.objectstore import ObjectStore

T = TypeVar("T")
_log = structlog.get_logger(__name__)

_REFRESH_SECONDS = 60.0
_MAX_NAMES = 50_000
"""Of blobs in a project's lease; what comes beyond has the grace only."""


class ReadLease:
    """The leases of one node's readers, one object per project; an async context manager.

    Args:
        objects: the shared store.
        holder: the node's name, for people.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        objects: ObjectStore,
        holder: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._holder = holder
        self._clock = clock
        self._digests: dict[str, Counter[str]] = {}
        self._contributions: dict[str, Counter[tuple[str, str]]] = {}
        self._leases: dict[str, Lease] = {}
        self._tasks = TaskSet(on_error=self._crashed)

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), name="read-leases")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # The leases stay and run out: builds of this node may be taken up after a restart.
        await self._tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("cache.read_lease.crashed", task=name, error=repr(error))

    @contextlib.contextmanager
    def reading(
        self,
        project_id: str,
        *,
        digests: Iterable[str] = (),
        contributions: Iterable[tuple[str, str]] = (),
    ) -> Iterator[None]:
        """Keep blobs in the shared store while the returned context is open; asks nobody.

        Args:
            project_id: whose blobs they are.
            digests: of the blobs.
            contributions: scope and name of contributions whose blobs are meant.
        """
        blobs, names = list(digests), list(contributions)
        held_blobs = self._digests.setdefault(project_id, Counter())
        held_names = self._contributions.setdefault(project_id, Counter())
        held_blobs.update(blobs)
        held_names.update(names)
        try:
            yield
        finally:
            _give_back(held_blobs, blobs)
            _give_back(held_names, names)

    async def refresh(self) -> None:
        """Bring the leases in line with what is being read.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        for project_id in list(self._digests):
            digests = self._digests[project_id]
            contributions = self._contributions[project_id]
            lease = self._leases.get(project_id)
            if not digests and not contributions:
                if lease is not None:
                    del self._leases[project_id]
                    await lease.end()
                continue
            if lease is None:
                lease = self._leases[project_id] = Lease(
                    self._objects, project_id, f"builds of {self._holder}", clock=self._clock
                )
            await lease.renew(sorted(digests)[:_MAX_NAMES], sorted(contributions)[:_MAX_NAMES])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            try:
                await self.refresh()
            except CacheUnavailableError as error:
                _log.info("cache.read_lease.failed", cause=error.message)


def _give_back(held: Counter[T], names: list[T]) -> None:
    held.subtract(names)
    for name in names:
        if held[name] <= 0:
            del held[name]
