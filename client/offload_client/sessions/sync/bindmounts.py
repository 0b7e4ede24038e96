"""Directories and files of this machine that containers of a session have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from offload_client.sessions.sync.directory import SyncedDirectory
from offload_client.sessions.sync.sources import check_source
from offload_core.aio import for_each
from offload_core.errors import NotFoundError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_client.sessions.sync.bindsettings import BindSettings
    from offload_client.sessions.sync.sources import Source
    from offload_client.sessions.sync.synclink import SyncCall

_PARALLEL = 8


class BindMounts:
    """All synchronised directories of one session; closed by its owner.

    Args:
        open_call: opens SessionSyncService.Sync for the session, again after a connection was
            lost; raises `OffloadError`.
        ids: user and group that files belong to in the session: the member's own, so that a
            container that runs as them may write.
        settings: of the member.
        warn: told sentences that people should read.
    """

    def __init__(
        self,
        open_call: Callable[[], Awaitable[SyncCall]],
        ids: tuple[int, int],
        settings: BindSettings,
        warn: Callable[[str], None],
    ) -> None:
        self._open_call = open_call
        self._ids = ids
        self._settings = settings
        self._warn = warn
        self._directories: dict[Source, SyncedDirectory] = {}
        self._starting: dict[Source, asyncio.Task[None]] = {}

    def describe(self) -> list[dict[str, Any]]:
        """Return how each directory stands, see `SyncedDirectory.describe`."""
        return [directory.describe() for directory in self._directories.values()]

    @property
    def sent_bytes(self) -> int:
        """Bytes of content that went to the session."""
        return sum(directory.sent_bytes for directory in self._directories.values())

    @property
    def received_bytes(self) -> int:
        """Bytes of content that came from the session."""
        return sum(directory.received_bytes for directory in self._directories.values())

    async def prepare(self, source: str, *, read_only: bool) -> str:
        """Have a directory or file in the session, and keep it the same from now on.

        A directory below one that is there already is a part of its copy.

        Args:
            source: path on this machine, absolute.
            read_only: nothing comes back.

        Returns:
            Its path in the engine's root file system.

        Raises:
            OffloadError: it cannot be synchronised; the sentence says why.
        """
        wanted = check_source(source, home=self._settings.home)
        known = self._directories.get(wanted)
        try:
            return await self._prepare(wanted, read_only=read_only)
        except NotFoundError:
            if known is None or not known.ended:
                raise
            # Another directory is in the place of the one that was followed.
            return await self._prepare(wanted, read_only=read_only)

    async def _prepare(self, wanted: Source, *, read_only: bool) -> str:
        directory = self._directories.get(wanted)
        if directory is None or directory.ended:
            former = directory
            above = None if wanted.only else self._above(wanted)
            if above is not None:
                directory, relative = above
                if not read_only:
                    directory.take_back()
                await directory.settle(there=False)
                return f"{directory.path}/{relative}"
            directory = SyncedDirectory(
                wanted, self._open_call, self._ids, self._settings, self._warn
            )
            if former is not None:
                directory.follows(former)
            self._directories[wanted] = directory
            starting = asyncio.ensure_future(directory.start(two_way=not read_only))
            self._starting[wanted] = starting
            starting.add_done_callback(lambda _: self._starting.pop(wanted, None))
            if former is not None:
                await former.aclose()
        elif not read_only:
            directory.take_back()
        starting_now = self._starting.get(wanted)
        try:
            if starting_now is not None:
                await asyncio.shield(starting_now)
            else:
                await directory.settle(there=False)
        except OffloadError:
            if self._directories.get(wanted) is directory and directory.ended:
                if not directory.path:
                    del self._directories[wanted]
                await directory.aclose()
            raise
        return directory.path

    async def before_start(self) -> None:
        """Wait until what was changed here is in the session.

        Raises:
            OffloadError: the connection is lost, so that a container would see old files.
        """
        await for_each(self._going(), lambda item: item.settle(there=False), parallel=_PARALLEL)

    async def after_exit(self) -> None:
        """Wait until what containers have written is here; a lost connection is a warning."""

        async def settle(directory: SyncedDirectory) -> None:
            try:
                await directory.settle(there=directory.two_way)
            except OffloadError as error:
                self._warn(
                    f"what containers wrote to {directory.source.path} may not be here yet: "
                    f"{error.message}"
                )

        await for_each(self._going(), settle, parallel=_PARALLEL)

    async def aclose(self) -> None:
        """Stop; harmless when done twice."""
        for starting in list(self._starting.values()):
            starting.cancel()
        await asyncio.gather(*(item.aclose() for item in self._directories.values()))
        self._directories.clear()

    def _going(self) -> list[SyncedDirectory]:
        return [item for item in self._directories.values() if not item.ended]

    def _above(self, wanted: Source) -> tuple[SyncedDirectory, str] | None:
        """Return a directory that has another one in its copy, and where."""
        for source, directory in self._directories.items():
            if source.only or directory.ended or not directory.path:
                continue
            if wanted.root.is_relative_to(source.root) and wanted.root != source.root:
                relative = wanted.root.relative_to(source.root).as_posix()
                if directory.has(relative):
                    return directory, relative
        return None
