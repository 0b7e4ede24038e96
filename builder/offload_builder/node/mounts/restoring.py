"""Brings a stored cache mount back before the step that uses it, or gives up in time."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.node.mounts.workerlink import MountWorker
from offload_core.aio import finish
from offload_core.errors import CacheUnavailableError, find_offload_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from offload_builder.node.mounts.documents import MountDocument
    from offload_cache.tiered import ProjectStore

PARALLEL_FETCHES = 8
FLOOR_SECONDS = 1.0
"""What a restore may always take; below it no measurement is worth anything."""
_SHARE_OF_COLD = 0.5
_SILENT_SHARE = 0.05
_MAX_SECONDS = 120.0
_FILE_COST_BYTES = 8192
"""Making a file costs as much as writing so many bytes, roughly."""
_USUAL_PACE = 100e6
"""Bytes per second, a file counted as above: a shared machine with a disk."""
_START_SECONDS = 0.15
_MEMORY_SECONDS = 600.0
_PLACING_SECONDS = 60.0
"""For what is not given up half-way: renaming what lies at the top of the mount."""
_TELLING_BYTES = 1 << 20
_WEIGHT_OF_NEW = 0.5


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a step waits for its cache mount, in seconds.

    Attributes:
        limit: for all of it.
        silence: until the first piece of it is there.
    """

    limit: float
    silence: float

    @classmethod
    def of(cls, document: MountDocument, command: str) -> Patience:
        """Return what is reasonable, given what the step took with the mount empty and full."""
        cold = document.cold.get(command, max(document.cold.values(), default=0.0))
        limit = min(_MAX_SECONDS, max(FLOOR_SECONDS, cold * _SHARE_OF_COLD))
        if command in document.cold and command in document.warm:
            limit = min(limit, max(0.0, cold - document.warm[command]))
        return cls(limit, min(limit, max(FLOOR_SECONDS, cold * _SILENT_SHARE)))


class Pace:
    """What restores have reached on this node, lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._per_second = _USUAL_PACE
        self._noted_at: float | None = None

    def estimate(self, document: MountDocument) -> float:
        """Return the seconds that a restore will take."""
        if self._noted_at is not None and self._clock() - self._noted_at > _MEMORY_SECONDS:
            # A store that was slow once gets another chance.
            self._per_second, self._noted_at = _USUAL_PACE, None
        return _START_SECONDS + _work(document) / self._per_second

    def note(self, document: MountDocument, seconds: float) -> None:
        """Learn from a restore, or from the time after which one was given up."""
        if _work(document) < _TELLING_BYTES:
            return  # says more of the start of a process
        measured = _work(document) / max(seconds, 0.001)
        before = self._per_second if self._noted_at is not None else measured
        self._per_second = _WEIGHT_OF_NEW * measured + (1 - _WEIGHT_OF_NEW) * before
        self._noted_at = self._clock()


def _work(document: MountDocument) -> int:
    return document.content_bytes + document.files * _FILE_COST_BYTES


async def restore(
    store: ProjectStore,
    document: MountDocument,
    root: Path,
    index: Path,
    patience: Patience,
    *,
    id_base: int = 0,
) -> float:
    """Fill an empty mount; nothing of it is to be seen when this fails.

    Args:
        store: has the blobs.
        document: what to restore.
        root: the mount's directory.
        index: file for what is then known of the mount.
        patience: bounds of the time.
        id_base: see `MountWorker`.

    Returns:
        The seconds it took.

    Raises:
        CacheUnavailableError: it takes too long. What has begun to be seen is seen as a whole,
            also when the restore is cancelled.
        NotFoundError: a blob is missing or damaged.
        InternalError: the files could not be written.
    """
    begun = time.monotonic()
    work = _Restore(store, document, patience, begun)
    blobs = store.disk.root
    async with MountWorker(root, index=index, blobs=blobs, id_base=id_base) as worker:
        try:
            async with asyncio.timeout(patience.limit):
                with store.lease(digest for digest, _ in document.blobs):
                    await work.run(worker)
        except TimeoutError as error:
            raise CacheUnavailableError(
                f"it takes longer than {patience.limit:.1f} s, which the step would not save"
            ) from error
        if not await finish(_place(worker), _PLACING_SECONDS):
            raise CacheUnavailableError("its files did not come to their place in time")
    return time.monotonic() - begun


async def _place(worker: MountWorker) -> bool:
    await worker.order("place")
    await worker.answer()
    return True


class _Restore:
    def __init__(
        self, store: ProjectStore, document: MountDocument, patience: Patience, begun: float
    ) -> None:
        self._store = store
        self._document = document
        self._patience = patience
        self._begun = begun
        self._blobs = store.disk.root

    async def run(self, worker: MountWorker) -> None:
        """Make everything in the hidden directory."""
        tree = await self._store.open_blob(self._document.tree)
        await worker.start("unpack", tree=self._below(tree), name=secrets.token_hex(8))
        head, _ = await worker.answer()
        pieces = [(str(digest), int(size)) for digest, size in head["pieces"]]
        try:
            async with asyncio.TaskGroup() as group:
                numbers = iter(range(len(pieces)))
                for _ in range(PARALLEL_FETCHES):
                    group.create_task(self._fetch(worker, pieces, numbers))
                group.create_task(self._follow(worker, pieces))
        except ExceptionGroup as errors:
            raise find_offload_error(errors) or errors from None
        await worker.order("complete")
        await worker.answer()

    def _below(self, path: Path) -> str:
        return os.path.relpath(path, self._blobs)

    async def _fetch(
        self, worker: MountWorker, pieces: list[tuple[str, int]], numbers: Iterator[int]
    ) -> None:
        for number in numbers:
            path = await self._store.open_blob(pieces[number][0])
            await worker.order("add", piece=number, path=self._below(path))

    async def _follow(self, worker: MountWorker, pieces: list[tuple[str, int]]) -> None:
        total = sum(size for _, size in pieces)
        done = 0
        for count in range(len(pieces)):
            try:
                async with asyncio.timeout(self._patience.silence if count == 0 else None):
                    head, _ = await worker.answer()
            except TimeoutError as error:
                raise CacheUnavailableError("nothing of it came in time") from error
            done += pieces[int(head["added"])][1]
            # The first ones come together; alone they say nothing of the pace.
            if count + 1 >= min(PARALLEL_FETCHES, len(pieces)):
                self._check_pace(done, total)

    def _check_pace(self, done: int, total: int) -> None:
        elapsed = time.monotonic() - self._begun
        if elapsed > FLOOR_SECONDS and done and elapsed * total / done > self._patience.limit:
            raise CacheUnavailableError(
                f"it would take {elapsed * total / done:.1f} s,"
                f" more than the {self._patience.limit:.1f} s that it may"
            )
