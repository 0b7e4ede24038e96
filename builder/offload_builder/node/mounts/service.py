"""The cache mounts of one daemon: filled before a step runs, stored after a build that worked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.mounts.bundle import read_bundle
from offload_builder.node.mounts.documents import command_key, experience
from offload_builder.node.mounts.gate import StepGate
from offload_builder.node.mounts.keeper import MountKeeper
from offload_builder.node.mounts.library import MountLibrary
from offload_builder.node.mounts.naming import CACHE_MOUNT, MountName, find_record, mount_id
from offload_builder.node.mounts.restoring import Pace, Patience, restore
from offload_builder.node.mounts.usage import (
    BuildMounts,
    LiveMount,
    MountSettings,
    StepTime,
    common_scopes,
)
from offload_builder.node.mounts.workerlink import MountWorker
from offload_core.aio import TaskSet, finish
from offload_core.errors import CacheUnavailableError, OffloadError
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from offload_builder.buildkit.daemon import BuildkitDaemon
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.mounts.bundle import CacheDirectory
    from offload_builder.node.mounts.gate import Step
    from offload_cache.tiered import ProjectStore

log = structlog.get_logger(__name__)

_TELL_SECONDS = 2.0
_MAX_KNOWN = 1_000
_INDEX_SECONDS = 30 * 86_400
_CLEAR_SECONDS = 1.0
"""How long a step waits for the rest of a failed restore to go; it is hidden anyway."""


class CacheMounts:
    """Owns the gate of one daemon and stores its cache mounts; an async context manager.

    Args:
        store: the blobs of the project.
        folder: for the gate and what is known of mounts.
        settings: bounds.
        packing: shared by all daemons of the node: so many mounts are stored at once.
    """

    def __init__(
        self,
        store: ProjectStore,
        folder: Path,
        settings: MountSettings,
        packing: asyncio.Semaphore,
    ) -> None:
        self._store = store
        self._library = MountLibrary(store)
        self._settings = settings
        self._indexes = folder / "index"
        self._gate = StepGate(folder, self._before)
        self._daemon: BuildkitDaemon | None = None
        self._watchers: list[Callable[[Step], Awaitable[None]]] = []
        self._builds: list[BuildMounts] = []
        self._mounts: dict[Path, LiveMount] = {}
        self._keeper = MountKeeper(
            store,
            self._library,
            settings,
            self._mounts,
            self._index,
            lambda: bool(self._builds),
            packing,
        )
        self._pace = Pace()
        self._naming = asyncio.Lock()
        self._tasks = TaskSet(self._crashed)
        self._stack = AsyncExitStack()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        if not isinstance(error, OffloadError | OSError):
            log.error("mounts.task.failed", task=name, exc_info=error)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await asyncio.to_thread(_tidy, self._indexes)
            stack.push_async_callback(self._tasks.close)
            await stack.enter_async_context(self._gate)
            await stack.enter_async_context(self._keeper)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def shell(self) -> str:
        """What the daemon's runc has to do before each step."""
        return self._gate.shell

    def serve(self, daemon: BuildkitDaemon) -> None:
        """Say whose steps the gate tells about."""
        self._daemon = daemon

    def watch(self, watcher: Callable[[Step], Awaitable[None]]) -> None:
        """Have somebody else told of each step before it runs."""
        self._watchers.append(watcher)

    @contextmanager
    def building(self, build: BuildMounts) -> Iterator[None]:
        """Fill the mounts of steps while a build runs; note those to be stored after it."""
        self._builds.append(build)
        try:
            yield
        finally:
            self._builds.remove(build)
            if not self._builds:
                # BuildKit ends the steps of a build that was given up only once they run.
                for mount in self._mounts.values():
                    if mount.filling is not None:
                        mount.filling.cancel()
            if build.worked:
                self._keeper.learn(build)

    # Before and while a step runs.

    async def _before(self, step: Step) -> None:
        for watcher in self._watchers:
            await watcher(step)
        daemon = self._daemon
        if daemon is None or daemon.pid is None or not self._builds:
            return
        try:
            bundle = read_bundle(step.bundle, daemon.settings.root, daemon.pid)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("mounts.bundle.unreadable", cause=f"{type(error).__name__}: {error}")
            return
        if not bundle.directories:
            return
        mounts = [self._live(directory) for directory in bundle.directories]
        empty = [mount for mount in mounts if mount.users == 0 and mount.directory.is_empty()]
        for mount in mounts:
            mount.users += 1
            mount.interrupt()
        begun = time.monotonic()
        command = command_key(bundle.arguments)
        try:
            if any(mount.name is None for mount in mounts):
                await self._identify(daemon, mounts, bundle.arguments)
            for mount in empty:
                if mount.name is not None and mount.filling is None:
                    mount.filling = self._tasks.start(
                        self._fill(mount, command), name=f"fill {mount.name.id}"
                    )
            if fillings := [mount.filling for mount in mounts if mount.filling is not None]:
                await asyncio.wait(fillings)
        finally:
            builds = list(self._builds)
            for build in builds:
                build.touched |= {mount.directory.snapshot for mount in mounts if mount.name}
            self._tasks.start(
                self._follow(step, mounts, builds, command, begun), name=f"step {step.pid}"
            )

    def _live(self, directory: CacheDirectory) -> LiveMount:
        if len(self._mounts) >= _MAX_KNOWN:
            for snapshot in [path for path in self._mounts if not path.exists()]:
                del self._mounts[snapshot]
        mount = self._mounts.setdefault(directory.snapshot, LiveMount(directory))
        mount.directory = directory
        return mount

    async def _identify(
        self, daemon: BuildkitDaemon, mounts: list[LiveMount], arguments: tuple[str, ...]
    ) -> None:
        try:
            async with self._naming:
                # Only of those in use: of the others BuildKit would measure the size, and a step
                # that wants one meanwhile gets an empty directory instead.
                records = await daemon.client.disk_usage([f"type=={CACHE_MOUNT},inuse"])
                for mount in mounts:
                    if mount.name is not None:
                        continue
                    taken = {other.record for other in self._mounts.values()}
                    record = find_record(mount.directory, arguments, records, taken)
                    if record is None:
                        log.debug("mounts.unknown", destination=mount.directory.destination)
                        continue
                    mount.record = record.id
                    mount.name = MountName(
                        mount_id(record) or "", mount.directory.base, self._settings.platform
                    )
        except OffloadError as error:
            log.warning("mounts.unknown", cause=error.message)

    async def _follow(
        self,
        step: Step,
        mounts: list[LiveMount],
        builds: list[BuildMounts],
        command: str,
        begun: float,
    ) -> None:
        """Hold the mounts until their step has ended; note what it took."""
        ran = time.monotonic()
        cold = [mount for mount in mounts if mount.directory.is_empty()]
        try:
            await step.ended.wait()
        finally:
            for mount in mounts:
                mount.users -= 1
                if mount.users == 0:
                    mount.filling = None
        ended = time.monotonic()
        for mount in mounts:
            timed = StepTime(
                mount.directory.snapshot, command, ended - ran, ran - begun, mount in cold
            )
            for build in builds:
                build.times.append(timed)

    # Filling.

    async def _fill(self, mount: LiveMount, command: str) -> float:
        """Restore a mount; return the seconds, 0 when there was nothing to restore."""
        name = mount.name
        if name is None:
            return 0.0
        if mount.directory.has_leftovers():
            # Of a node that ended in the middle; this step may get nothing that removes it.
            await self._clear(mount.directory.visible)
        document = await self._library.find(common_scopes(self._builds), name)
        if document is None:
            return 0.0
        mount.cold = experience(document.cold, mount.cold)
        mount.warm = experience(document.warm, mount.warm)
        where = {"id": name.id, "scope": document.scope, "bytes": document.moved_bytes}
        patience = Patience.of(document, command)
        if document.content_bytes > self._settings.max_bytes:
            log.info("mounts.restore.skipped", reason="it is larger than allowed here", **where)
            return 0.0
        if (expected := self._pace.estimate(document)) > patience.limit:
            log.info(
                "mounts.restore.skipped", reason="it would take longer than it saves",
                expected_seconds=round(expected, 2), limit_seconds=patience.limit, **where,
            )  # fmt: skip
            return 0.0
        visible = mount.directory.visible
        index = self._index(mount.directory)
        try:
            seconds = await restore(self._store, document, visible, index, patience)
        except asyncio.CancelledError:
            with contextlib.suppress(OffloadError, OSError):
                await finish(_clear(visible), _CLEAR_SECONDS)
            raise
        except (OffloadError, OSError) as error:
            if isinstance(error, CacheUnavailableError):
                self._pace.note(document, patience.limit)
            cause = error.message if isinstance(error, OffloadError) else str(error)
            log.warning("mounts.restore.failed", cause=cause, **where)
            index.unlink(missing_ok=True)
            await self._clear(visible)
            return 0.0
        self._pace.note(document, seconds)
        log.info("mounts.restored", seconds=round(seconds, 3), files=document.files, **where)
        self._tell(
            f"cache mount {name.id.removeprefix('/')}:"
            f" {format_size(document.content_bytes)} restored in {seconds:.1f} s"
        )
        return seconds

    async def _clear(self, visible: Path) -> None:
        clearing = self._tasks.start(_clear(visible), name="mounts.clear")
        await asyncio.wait((clearing,), timeout=_CLEAR_SECONDS)

    def _tell(self, text: str) -> None:
        for build in self._builds:
            if build.tell is not None:
                self._tasks.start(_within(build.tell(text)), name="mounts.tell")

    def _index(self, directory: CacheDirectory) -> Path:
        return self._indexes / directory.snapshot.name

    async def settle(self, timeout: float) -> bool:
        """Store at once what waits, and wait until other nodes can read it.

        Returns:
            Whether all of it is done.
        """
        return await self._keeper.settle(timeout)


def open_cache_mounts(
    store: ProjectStore, folder: Path, config: NodeConfig, packing: asyncio.Semaphore
) -> CacheMounts | None:
    """Return the cache mounts of a daemon; None where they cannot or need not move.

    Args:
        store: the blobs of the project.
        folder: for the gate and what is known of mounts; created later.
        config: of the node.
        packing: shared by all daemons of the node.
    """
    if not config.cache_mounts or store.objects is None:
        return None
    settings = MountSettings(
        node=config.name(),
        platform=config.native_platforms()[0],
        max_bytes=config.cache_mount_max,
        interval_seconds=config.cache_mount_interval,
    )
    return CacheMounts(store, folder.absolute(), settings, packing)


def _tidy(indexes: Path) -> None:
    """Make the directory of indexes, and forget mounts that were not stored for long."""
    indexes.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - _INDEX_SECONDS
    for path in indexes.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink()


async def _within(awaitable: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError, OffloadError):
        async with asyncio.timeout(_TELL_SECONDS):
            await awaitable


async def _clear(root: Path) -> None:
    """Remove what a restore that failed has left."""
    async with MountWorker(root, nice=10) as worker:
        await worker.start("clear")
        await worker.answer()
