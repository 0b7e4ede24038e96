"""The durable queue that brings a node's blobs to the shared store, off the builds' critical path.

A publication is a set of blobs and the document that names them, in stages: layers first, then
manifests, then the document. A stage is started when the one before is complete, so a reader
that sees a document can read all it names. The queue lives in the node's index: what was accepted
is uploaded after a restart, too.

A lease keeps collections from the blobs that a publication relies upon. Where it lapsed, as after
a restart or a long outage, the publication begins again with its first stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.collection.publishing import (
    BlobFound,
    CondemnedError,
    Publishing,
    Sightings,
)
from offload_cache.collection.timing import CONDEMNED_WAIT_SECONDS
from offload_cache.presence import BlobState
from offload_cache.statistics import CacheStatistics
from offload_cache.uploadtable import UploadTable
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

    from offload_cache.database import CacheDatabase
    from offload_cache.objectstore import ObjectStore
    from offload_cache.presence import Presence
    from offload_cache.uploadtable import QueuedUpload, UploadItem

_log = structlog.get_logger(__name__)

_MAX_PUBLICATIONS = 5_000
_PATIENCE_SECONDS = 900.0
"""A burst of builds may keep more than the disk's bound for so long."""
_MAX_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0
_IDLE_SECONDS = 30.0
_KEEP_LEASES_SECONDS = 60.0
_WITHDRAW_SECONDS = 10.0
_WITHDRAW_POLL_SECONDS = 0.02
_REMEMBERED_DROPS = 1_000


@dataclass(frozen=True, slots=True)
class ProjectUploads:
    """Where the queue finds a project's blobs and notes what it learns.

    Attributes:
        find: returns the file of a blob.
        settle: makes `find` quick for these blobs.
        presence: what is known of the shared store.
    """

    find: Callable[[str], Path | None]
    settle: Callable[[Iterable[str]], Awaitable[None]]
    presence: Presence


class UploadQueue:
    """Uploads publications with a bounded number of parallel transfers; an async context manager.

    `resolve` opens the project of an item that is due; after a restart nobody else may have.
    """

    def __init__(
        self,
        database: CacheDatabase,
        objects: ObjectStore,
        resolve: Callable[[str], Awaitable[ProjectUploads]],
        *,
        workers: int = 4,
        statistics: CacheStatistics | None = None,
    ) -> None:
        self._table = UploadTable(database)
        self._objects = objects
        self._resolve = resolve
        self._workers = workers
        self._statistics = statistics or CacheStatistics()
        self._wake = asyncio.Event()
        self._running: set[str] = set()
        self._waiters: defaultdict[int, list[asyncio.Future[bool]]] = defaultdict(list)
        self._dropped: deque[int] = deque(maxlen=_REMEMBERED_DROPS)
        self._sightings = Sightings()
        self._publishing: dict[int, Publishing] = {}
        self._tasks = TaskSet(on_error=self._crashed)
        self._pause_until = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def __aenter__(self) -> Self:
        await self._table.restart()  # no lease has outlived the last run
        self._tasks.start(self._dispatch(), name="upload-queue")
        self._tasks.start(self._keep_leases(), name="upload-leases")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(False)

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("cache.upload.crashed", task=name, error=repr(error))

    async def publish(
        self,
        name: str,
        project_id: str,
        items: Sequence[UploadItem],
        *,
        max_bytes: int | None = None,
    ) -> int:
        """Accept a publication and return its number; the uploads follow in the background.

        Of several waiting publications with one name only the oldest, which may be half done, and
        the newest are kept. When the waiting blobs of the project have more than `max_bytes`,
        those that have waited long are given up: a store that is away must not fill the disk.
        """
        number, dropped = await self._table.add(name, project_id, items, _MAX_PUBLICATIONS)
        excess: list[int] = []
        if max_bytes is not None:
            excess = await self._table.drop_excess(project_id, max_bytes, _PATIENCE_SECONDS)
        if excess:
            _log.warning(
                "cache.upload.given_up",
                project_id=project_id,
                publications=len(excess),
                limit_bytes=max_bytes,
                cause="too much waits for the shared store",
            )
        for other in [*dropped, *excess]:
            self._settle(other, published=False)
        self._wake.set()
        return number

    async def wait_published(self, publication: int, timeout: float) -> bool:
        """Wait until every other node can read a publication.

        Returns:
            False when that did not happen within `timeout` seconds, or never will because the
            publication was replaced by a newer one or its blobs are gone.
        """
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters[publication].append(waiter)
        try:
            if publication in self._dropped:
                return False
            if not await self._table.is_pending(publication):
                return publication not in self._dropped
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters[publication].remove(waiter)
            if not self._waiters[publication]:
                del self._waiters[publication]

    async def is_pending(self, publication: int) -> bool:
        """Whether a publication still waits, neither complete nor given up."""
        return await self._table.is_pending(publication)

    async def withdraw(self, publication: int) -> None:
        """Give a publication up; what of it is under way has ended when this returns.

        Waits at most `_WITHDRAW_SECONDS` for that.
        """
        keys = await self._table.keys(publication)
        await self._drop(publication)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                while not self._running.isdisjoint(keys):  # noqa: ASYNC110 - rare and short
                    await asyncio.sleep(_WITHDRAW_POLL_SECONDS)

    async def pending_digests(self, project_id: str) -> set[str]:
        """Return the blobs of a project that must stay on disk because they are to be uploaded."""
        return await self._table.pending_digests(project_id)

    async def pending_count(self, project_id: str = "") -> int:
        """Return how many objects wait for their upload, of one project or of all."""
        return await self._table.count(project_id)

    def _settle(self, publication: int, *, published: bool) -> None:
        if not published:
            self._dropped.append(publication)
        publishing = self._publishing.pop(publication, None)
        if publishing is not None:
            self._tasks.start(self._end(publishing), name=f"end lease {publication}")
        for waiter in self._waiters.get(publication, ()):
            if not waiter.done():
                waiter.set_result(published)

    async def _dispatch(self) -> None:
        while True:
            self._wake.clear()
            wait_seconds = _IDLE_SECONDS
            pause = self._pause_until - time.monotonic()
            if pause > 0:
                wait_seconds = pause
            elif len(self._running) < self._workers:
                try:
                    due, next_due_seconds = await self._table.due(self._running, self._workers)
                except sqlite3.Error as error:
                    self._pause(f"the index failed: {error}")
                    continue
                for item in due[: self._workers - len(self._running)]:
                    self._running.add(item.object_key)
                    self._tasks.start(self._handle(item), name=f"upload {item.object_key}")
                wait_seconds = min(wait_seconds, next_due_seconds)
            try:
                async with asyncio.timeout(max(wait_seconds, 0.01)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _handle(self, item: QueuedUpload) -> None:
        try:
            await self._attempt(item)
        except sqlite3.Error as error:
            # The index cannot be written, as on a full disk: the item is due again at once.
            self._pause(f"the index failed: {error}")
        finally:
            self._running.discard(item.object_key)
            self._wake.set()

    async def _attempt(self, item: QueuedUpload) -> None:
        try:
            finished = await self._upload(item)
        except CacheUnavailableError as error:
            self._pause(error.message)
        except CondemnedError:
            await self._table.delay(item.publication, CONDEMNED_WAIT_SECONDS)
        except NotFoundError:
            _log.warning("cache.upload.dropped", object_key=item.object_key, cause="blob is gone")
            await self._drop(item.publication)
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - one bad item must not stop the queue
            _log.warning("cache.upload.failed", object_key=item.object_key, error=repr(error))
            if item.attempts + 1 >= _MAX_ATTEMPTS:
                await self._drop(item.publication)
            else:
                await self._table.postpone(item.id, _backoff(item.attempts))
        else:
            if finished:
                await self._done(item)
            self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def _done(self, item: QueuedUpload) -> None:
        finished, replaced = await self._table.done(item)
        for publication in finished:
            _log.info("cache.publication.completed", publication=publication)
            self._settle(publication, published=True)
        for publication in replaced:
            self._settle(publication, published=False)

    async def _drop(self, publication: int) -> None:
        await self._table.remove(publication)
        self._settle(publication, published=False)

    def _pause(self, cause: str) -> None:
        now = time.monotonic()
        if now < self._pause_until:
            return  # several transfers failed at once: one pause for all
        self._pause_until = now + self._pause_seconds * random.uniform(0.5, 1.0)  # noqa: S311
        _log.info("cache.upload.paused", cause=cause, pause_seconds=round(self._pause_seconds, 1))
        self._pause_seconds = min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)

    async def _upload(self, item: QueuedUpload) -> bool:
        """Bring one item to the store; False when its publication had to begin again."""
        publishing = await self._publishing_of(item)
        if not await publishing.protect() and await self._table.restart(item.publication):
            _log.info("cache.publication.restarted", publication=item.publication)
            return False
        turn = publishing.turn
        if item.digest is None:
            await self._objects.write_bytes(item.object_key, item.body or b"")
        else:
            await self._upload_blob(publishing, item, item.digest)
        if publishing.turn == turn and publishing.holds:
            return True
        # It took longer than the lease counts: a blob of an earlier stage may be gone.
        await self._table.restart(item.publication)
        return False

    async def _upload_blob(self, publishing: Publishing, item: QueuedUpload, digest: str) -> None:
        project = await self._resolve(item.project)
        await project.settle([digest])
        known = project.presence.get(digest)
        if known is not None and known.state is BlobState.LOST:
            # A lost object may still be listed with the right size: write it again unasked.
            self._sightings.forget(item.project, digest)
            found = await publishing.write(digest, project.find)
        else:
            try:
                found = await publishing.ensure(digest, item.size_bytes, project.find)
            except NotFoundError:
                # Somebody was told that it is there; the next build shall push it.
                await project.presence.note(digest, BlobState.LOST)
                raise
        if found is not BlobFound.WRITTEN:
            self._statistics.shared_writes_skipped += 1
        if found is not BlobFound.KNOWN and item.size_bytes is not None:
            await project.presence.note(digest, BlobState.PRESENT, item.size_bytes)

    async def _publishing_of(self, item: QueuedUpload) -> Publishing:
        publishing = self._publishing.get(item.publication)
        if publishing is None:
            digests = await self._table.digests(item.publication)
            publishing = self._publishing.setdefault(
                item.publication,
                Publishing(
                    self._objects,
                    item.project,
                    digests,
                    self._sightings,
                    holder=f"publication {item.publication}",
                ),
            )
        return publishing

    async def _keep_leases(self) -> None:
        """Renew leases also while one large blob is under way."""
        while True:
            await asyncio.sleep(_KEEP_LEASES_SECONDS)
            if time.monotonic() < self._pause_until:
                continue
            try:
                await self._renew_leases()
            except (CacheUnavailableError, CondemnedError):
                continue
            except sqlite3.Error as error:
                self._pause(f"the index cannot be used: {error}")

    async def _renew_leases(self) -> None:
        for publication, publishing in list(self._publishing.items()):
            if not await self._table.is_pending(publication):
                self._settle(publication, published=publication not in self._dropped)
            if publishing.holds and not await publishing.protect():
                await self._table.restart(publication)

    async def _end(self, publishing: Publishing) -> None:
        with contextlib.suppress(CacheUnavailableError):
            await publishing.end()


def _backoff(attempts: int) -> float:
    pause: float = min(_FIRST_PAUSE_SECONDS * 2**attempts, _LONGEST_PAUSE_SECONDS)
    return pause * random.uniform(0.5, 1.0)  # noqa: S311
