"""A replica that follows what happens to its tree."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Self

from offload_core.aio import TaskSet
from offload_core.treesync.exchange import ReplicaThread
from offload_core.treesync.inotify import Inotify
from offload_core.treesync.replica import Replica
from offload_core.treesync.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_core.treesync.entries import Listing
    from offload_core.treesync.replica import KnownDigests, Limits
    from offload_core.treesync.rules import Rules

DEBOUNCE_SECONDS = 0.01
"""A program that saves a file does several things to it; they are looked at together."""
_BUSY_SECONDS = 0.3
_WATCHED_RESCAN_SECONDS = 60.0
_UNWATCHED_RESCAN_SECONDS = 1.0
_RESCAN_SHARE = 20.0
"""An unwatched tree is scanned a twentieth of the time, a watched one a two-hundredth."""


class LiveReplica:
    """A replica, its thread and its watches; an async context manager.

    Attributes:
        replica: what is known; for `thread` only.
        thread: the only one that uses it.
    """

    def __init__(
        self,
        root: Path,
        rules: Rules,
        limits: Limits,
        *,
        owner: tuple[int, int] | None = None,
        known: KnownDigests | None = None,
        watch: bool = True,
    ) -> None:
        self.thread = ReplicaThread("sync-files")
        self._tree = Tree(root, owner=owner)
        self._inotify: Inotify | None = None
        if watch:
            with contextlib.suppress(OSError):
                self._inotify = Inotify()
        self.replica = Replica(self._tree, rules, limits, watcher=self._inotify, known=known)
        self._happened = asyncio.Event()
        self._tasks = TaskSet()
        self._scan_seconds = 0.0
        self._scanned_at = 0.0
        self._reading = False

    async def __aenter__(self) -> Self:
        """Look at everything.

        Raises:
            NotFoundError: the directory is gone.
            QuotaExceededError: it holds more than it may.
        """
        try:
            await self.thread.run(self._scan)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop following; harmless when done twice."""
        await self._tasks.close()
        self._listen(on=False)
        await self.thread.close()
        self.replica.close()
        if self._inotify is not None:
            self._inotify.close()

    def follow(self, changed: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Follow what happens from now on.

        Args:
            changed: called when there is something for `take`.
            failed: called when the tree cannot be followed any more.
        """
        self._tasks = TaskSet(lambda _, error: failed(error))
        self._tasks.start(self._follow(changed), name="sync-follow")

    async def flush(self) -> None:
        """Look at all that has happened up to now."""
        await self.thread.run(self._notice, True)

    async def take(self) -> Listing:
        """Return the entries that have changed since the last time, with `ABSENT` for none."""
        return await self.thread.run(self.take_now)

    async def take_all(self) -> Listing:
        """Return all entries; for whoever may have missed a change."""
        return await self.thread.run(self._all)

    def _all(self) -> Listing:
        self.replica.changed.clear()
        return dict(self.replica.entries)

    async def take_kept(self) -> list[str]:
        """Return where versions were kept that somebody wrote while they were replaced."""
        kept, self.replica.kept = self.replica.kept, []
        return kept

    def take_now(self) -> Listing:
        """Do the same; for the thread."""
        changed, self.replica.changed = self.replica.changed, set()
        return {path: self.replica.entry(path) for path in changed}

    async def _follow(self, changed: Callable[[], None]) -> None:
        while True:
            self._listen(on=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._happened.wait()
            self._happened.clear()
            await asyncio.sleep(DEBOUNCE_SECONDS)
            if time.monotonic() - self._scanned_at > self._interval():
                await self.thread.run(self._scan)
            else:
                await self.thread.run(self._notice, False)
            if self.replica.changed or self.replica.kept:
                changed()

    def _interval(self) -> float:
        if self.replica.watched:
            return max(_WATCHED_RESCAN_SECONDS, 10 * _RESCAN_SHARE * self._scan_seconds)
        return max(_UNWATCHED_RESCAN_SECONDS, _RESCAN_SHARE * self._scan_seconds)

    def _patience(self) -> float:
        left = self._scanned_at + self._interval() - time.monotonic()
        return max(0.0, min(left, _BUSY_SECONDS) if self.replica.busy else left)

    def _listen(self, *, on: bool) -> None:
        if self._inotify is None or self._reading == on:
            return
        loop = asyncio.get_running_loop()
        self._reading = on
        if on:
            loop.add_reader(self._inotify.descriptor, self._heard)
        else:
            loop.remove_reader(self._inotify.descriptor)

    def _heard(self) -> None:
        self._listen(on=False)
        self._happened.set()

    def _scan(self) -> None:
        started = time.monotonic()
        if self._inotify is not None:
            self._inotify.read()
        self.replica.scan()
        self._scanned_at = time.monotonic()
        self._scan_seconds = self._scanned_at - started

    def _notice(self, force: bool) -> None:
        busy, self.replica.busy = self.replica.busy, set()
        if self._inotify is None or not self._inotify.complete:
            if force:
                self._scan()
            else:
                self.replica.refresh(busy)
            return
        noticed = self._inotify.read()
        if noticed.lost:
            self._scan()
        self.replica.refresh(noticed.paths | busy, force=force)
