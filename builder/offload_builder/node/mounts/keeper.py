"""Stores cache mounts after builds that worked: in the background, when nobody uses them."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.mounts.documents import MountDocument, experience
from offload_builder.node.mounts.keeping import pack
from offload_builder.node.mounts.usage import BuildMounts, DueMount, LiveMount
from offload_core.aio import TaskSet
from offload_core.errors import OffloadError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.node.mounts.bundle import CacheDirectory
    from offload_builder.node.mounts.library import MountLibrary
    from offload_builder.node.mounts.naming import MountName
    from offload_builder.node.mounts.usage import MountSettings
    from offload_cache.tiered import ProjectStore

log = structlog.get_logger(__name__)

_CHECK_SECONDS = 1.0
_IDLE_WAIT_SECONDS = 60.0
"""How long a mount waits for the daemon to be idle before it is stored beside builds."""
_MAX_DUE = 1_000


class MountKeeper:
    """Stores the mounts of one daemon; an async context manager.

    Args:
        store: the blobs of the project.
        library: the documents.
        settings: bounds.
        mounts: what is known, by snapshot; shared with the side that fills them.
        index: tells the file with what is known of a mount's files.
        busy: whether builds run.
        packing: so many mounts are stored at once.
    """

    def __init__(
        self,
        store: ProjectStore,
        library: MountLibrary,
        settings: MountSettings,
        mounts: dict[Path, LiveMount],
        index: Callable[[CacheDirectory], Path],
        busy: Callable[[], bool],
        packing: asyncio.Semaphore,
    ) -> None:
        self._store = store
        self._library = library
        self._settings = settings
        self._mounts = mounts
        self._index = index
        self._busy = busy
        self._packing = packing
        self._due: dict[tuple[Path, str], DueMount] = {}
        self._keeping = asyncio.Lock()
        self._publications: dict[tuple[MountName, str], int] = {}
        self._tasks = TaskSet(self._crashed)

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        log.error("mounts.keep.crashed", task=name, exc_info=error)

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), name="mounts.keep")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    def learn(self, build: BuildMounts) -> None:
        """Note what a build that worked says of its mounts, and that they are to be stored."""
        for timed in build.times:
            mount = self._mounts.get(timed.snapshot)
            if mount is None:
                continue
            known = mount.cold if timed.cold else mount.warm
            known[timed.command] = round(timed.seconds, 2)
        if not build.write_scope:
            return
        for snapshot in build.touched:
            key = (snapshot, build.write_scope)
            if len(self._due) < _MAX_DUE:
                self._due.setdefault(key, DueMount(snapshot, build.write_scope, build.build_id))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            for due in list(self._due.values()):
                mount = self._mounts.get(due.snapshot)
                if mount is None or self._ripe(due, mount):
                    await self._keep(due, mount)

    def _ripe(self, due: DueMount, mount: LiveMount) -> bool:
        now = time.monotonic()
        kept = mount.kept_at.get(due.scope)
        if mount.users:
            return False
        if kept is not None and now - kept < self._settings.interval_seconds:
            return False
        return not self._busy() or now - due.since > _IDLE_WAIT_SECONDS

    async def _keep(self, due: DueMount, mount: LiveMount | None) -> None:
        """Store one mount unless a step uses it, or comes meanwhile; one mount at a time."""
        async with self._keeping:
            key = (due.snapshot, due.scope)
            if key not in self._due or (mount is not None and mount.users):
                return
            del self._due[key]
            if mount is None or mount.name is None or not due.snapshot.exists():
                if mount is not None and not due.snapshot.exists():
                    self._mounts.pop(due.snapshot, None)
                    self._index(mount.directory).unlink(missing_ok=True)
                return
            await self._keep_now(due, mount, mount.name)

    async def _keep_now(self, due: DueMount, mount: LiveMount, name: MountName) -> None:
        keeping = self._tasks.start(self._store_mount(due, mount, name), name="mounts.store")
        mount.keeping = keeping
        try:
            await asyncio.wait((keeping,))
        finally:
            keeping.cancel()
            mount.keeping = None
        if keeping.cancelled():
            mount.kept_at.pop(due.scope, None)
            self._due.setdefault((due.snapshot, due.scope), due)
        elif not keeping.exception() and (publication := keeping.result()) is not None:
            while len(self._publications) >= _MAX_DUE:
                del self._publications[next(iter(self._publications))]
            self._publications[name, due.scope] = publication

    async def _store_mount(self, due: DueMount, mount: LiveMount, name: MountName) -> int | None:
        begun = time.monotonic()
        where = {"id": name.id, "scope": due.scope}
        try:
            async with self._packing:
                with ExitStack() as leases:
                    mount.kept_at[due.scope] = time.monotonic()
                    packed = await pack(
                        self._store,
                        mount.directory.stored,
                        self._index(mount.directory),
                        self._settings.max_bytes,
                        leases,
                    )
                    before = await self._library.read(due.scope, name)
                    cold, warm = _experience(before, mount)
                    # What steps took varies; on its own it is no reason to write again.
                    if (
                        before is not None
                        and before.tree == packed.tree
                        and before.warm.keys() == warm.keys()
                    ):
                        return None
                    document = MountDocument(
                        name, due.scope, packed.tree, packed.blobs, packed.files,
                        packed.content_bytes, self._settings.node, due.build_id,
                        datetime.now(UTC), cold, warm,
                    )  # fmt: skip
                    publication = await self._library.publish(document)
        except QuotaExceededError as error:
            log.info("mounts.keep.skipped", cause=error.message, **where)
            return None
        except (OffloadError, OSError) as error:
            cause = error.message if isinstance(error, OffloadError) else str(error)
            log.warning("mounts.keep.failed", cause=cause, **where)
            return None
        log.info(
            "mounts.kept", files=packed.files, content_bytes=packed.content_bytes,
            new_bytes=packed.new_bytes, seconds=round(time.monotonic() - begun, 3), **where,
        )  # fmt: skip
        return publication

    async def settle(self, timeout: float) -> bool:
        """Store at once what waits, and wait until other nodes can read it.

        Returns:
            Whether all of it is done.
        """
        try:
            async with asyncio.timeout(timeout):
                for due in list(self._due.values()):
                    await self._keep(due, self._mounts.get(due.snapshot))
                async with self._keeping:
                    publications = list(self._publications.values())
                confirmed = [
                    await self._library.confirm(number, timeout) for number in publications
                ]
        except TimeoutError:
            return False
        return all(confirmed) and not self._due


def _experience(
    before: MountDocument | None, mount: LiveMount
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is known of commands: by the document that is there, and by this node."""
    cold, warm = mount.cold, mount.warm
    if before is not None:
        cold, warm = {**before.cold, **cold}, {**before.warm, **warm}
    cold = experience(cold)
    # Without the other figure, this one says nothing of what the mount saves.
    return cold, experience({key: value for key, value in warm.items() if key in cold})
