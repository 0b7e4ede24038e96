"""What a node does in the background to share its context content, never in the way of a build."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING

import structlog

from offload_cache.keys import pack_key
from offload_cache.packs.layout import pack_made_at
from offload_cache.packs.merge import PackMerger
from offload_cache.packs.pending import PendingBlobs
from offload_cache.packs.writer import DRAFT_SUFFIX, PackWriter
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore
    from offload_cache.packs.catalog import PackCatalog
    from offload_cache.packs.refresh import CatalogRefresh

log = structlog.get_logger(__name__)

QUIET_SECONDS = 1.0
"""An upload is over when nothing has come for so long."""
PATIENCE_SECONDS = 30.0
"""Content is shared after so long even while builds go on, then slowly."""
_BUSY_SHARE = 4.0
"""While builds run, each second of work is followed by so many of rest."""
_LOOK_SECONDS = 0.25
_SAVE_AFTER_SECONDS = 2.0
_NEWS_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0
_MARK_SECONDS = 86_400.0
_MAX_MARKED = 10_000


class SharingWork:
    """Packs, marks uses and merges for one project; see `SharedContext`."""

    def __init__(
        self,
        project_id: str,
        objects: ObjectStore,
        catalog: PackCatalog,
        refresh: CatalogRefresh,
        folder: Path,
        *,
        idle_seconds: float,
        thread: Executor,
        answers: Executor,
        read: Callable[[bytes], bytes | None],
        busy: Callable[[], bool],
    ) -> None:
        self._project_id = project_id
        self._objects = objects
        self._catalog = catalog
        self._refresh = refresh
        self._folder = folder
        self._answers = answers
        self._busy = busy
        self._mark_seconds = min(_MARK_SECONDS, idle_seconds / 4)
        self._pending = PendingBlobs(folder / "pending")
        self._writer = PackWriter(
            objects, project_id, catalog, folder,
            read=read, thread=thread, threads=answers, pace=self._pace,
        )  # fmt: skip
        self._merger = PackMerger(
            objects, project_id, catalog, self._writer, thread=thread, threads=answers
        )
        self._wake = asyncio.Event()
        self._tasks = TaskSet(on_error=self._crashed)
        self._added_at = 0.0
        self._waiting_since = 0.0
        self._closing = False
        self._resting = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._marked_at: dict[str, float] = {}
        self._marks: set[str] = set()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        log.error("context.share.crashed", task=name, error=repr(error))

    async def start(self) -> None:
        """Take up what was left at the last stop."""
        await asyncio.get_running_loop().run_in_executor(self._answers, self._prepare)
        if self._pending:
            self._waiting_since = time.monotonic()
            self._idle.clear()
            self._wake.set()
        self._tasks.start(self._run(), name="context-share")

    def _prepare(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(f"*{DRAFT_SUFFIX}"):
                left.unlink(missing_ok=True)
        self._pending.load()

    async def settle(self) -> None:
        """Pack for some seconds without waiting for quiet; once, before `close`."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        if not self._resting and self._objects.reachable:
            await self.wait_shared(_CLOSE_SECONDS)

    async def close(self) -> None:
        """Settle, end all work, note what is left for the next start."""
        await self.settle()
        await self._tasks.close()
        await self._save()

    async def wait_shared(self, seconds: float) -> bool:
        """Wait until all that was added is shared; False when it is not within `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set() and not self._resting

    def added(self, digests: Sequence[bytes]) -> None:
        """Note blobs that are stored on this node now."""
        if not digests:
            return
        self._added_at = time.monotonic()
        if not self._pending:
            self._waiting_since = self._added_at
        self._pending.add(digests)
        self._idle.clear()
        self._wake.set()

    def note_use(self, pack: str) -> None:
        """Note that a pack was read, so that it stays."""
        now = time.time()
        last = self._marked_at.get(pack, pack_made_at(pack))
        if now - last > self._mark_seconds:
            if len(self._marked_at) >= _MAX_MARKED:
                del self._marked_at[next(iter(self._marked_at))]
            self._marked_at[pack] = now
            if not (self._pending or self._marks):
                self._waiting_since = time.monotonic()
            self._marks.add(pack)
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._until_quiet()
                await self._share()
                await self._keep_house()
            except CacheUnavailableError as error:
                await self._rest(error.message)
            except OSError as error:
                await self._rest(f"the node's disk failed: {error.strerror}")
            except Exception as error:  # noqa: BLE001 - sharing ends with no fault of one pack
                await self._rest(repr(error))
            else:
                self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def _rest(self, cause: str) -> None:
        log.info(
            "context.share.paused",
            project_id=self._project_id,
            cause=cause,
            pending=len(self._pending),
            pause_seconds=self._pause_seconds,
        )
        await self._save()
        pause = self._pause_seconds * random.uniform(0.5, 1.0)  # noqa: S311
        self._pause_seconds = min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
        self._resting = True
        self._idle.set()  # nobody waits for a pause to end
        await asyncio.sleep(pause)
        self._resting = False
        if self._pending:
            self._idle.clear()
        self._wake.set()

    async def _until_quiet(self) -> None:
        saved = False
        started = time.monotonic()
        while not self._may_work():
            if not saved and time.monotonic() - started > _SAVE_AFTER_SECONDS:
                saved = True
                await self._save()
            await asyncio.sleep(_LOOK_SECONDS)

    def _may_work(self) -> bool:
        now = time.monotonic()
        late = bool(self._pending or self._marks) and now - self._waiting_since > PATIENCE_SECONDS
        return self._closing or late or not (self._receiving(now) or self._busy())

    def _receiving(self, now: float) -> bool:
        return now - self._added_at < QUIET_SECONDS

    async def _pace(self, seconds: float) -> None:
        """Let builds go first."""
        if self._closing:
            return
        if self._busy() or self._receiving(time.monotonic()):
            await asyncio.sleep(max(seconds * _BUSY_SHARE, 0.02))

    async def _share(self) -> None:
        if not self._pending:
            return
        # What another node has packed meanwhile need not be packed again.
        await self._refresh.refresh(_NEWS_SECONDS)
        while self._pending:
            await self._until_quiet()
            await self._writer.write_pack(self._pending)
        if self._pending.dropped:
            log.warning(
                "context.share.dropped", project_id=self._project_id, blobs=self._pending.dropped
            )
            self._pending.dropped = 0
        await self._save()
        if not self._pending:
            self._idle.set()

    async def _keep_house(self) -> None:
        if self._closing:
            return
        for pack in list(self._marks):
            await self._objects.write_bytes(pack_key(self._project_id, "used", pack), b"")
            self._marks.discard(pack)
        await self._merger.merge()

    async def _save(self) -> None:
        await asyncio.get_running_loop().run_in_executor(
            self._answers, self._pending.save, self._pending.snapshot()
        )
