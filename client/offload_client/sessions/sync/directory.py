"""One directory of this machine that is kept the same in a session."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

from offload_client.context.ignorefile import parse_ignore_file
from offload_client.sessions.backoff import FIRST_SECONDS, BackOff
from offload_client.sessions.sync.knowndigests import IndexedDigests
from offload_client.sessions.sync.merging import Merging
from offload_client.sessions.sync.synclink import BATCH_OPERATIONS, SyncCall, SyncLink
from offload_core.aio import TaskSet, stop
from offload_core.errors import (
    AccessDeniedError,
    ContextError,
    NodeLostError,
    NotFoundError,
    OffloadError,
    QuotaExceededError,
    UsageError,
    VersionError,
)
from offload_core.treesync.live import LiveReplica
from offload_core.treesync.rules import Rules
from offload_proto.v1.session_sync_service_pb2 import SyncOpen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from offload_client.sessions.sync.bindsettings import BindSettings
    from offload_client.sessions.sync.sources import Source
    from offload_core.treesync.decisions import Operation
    from offload_core.treesync.entries import Listing
    from offload_proto.v1.session_sync_service_pb2 import SyncOpened

log = logging.getLogger("offload.session")
"""Of the helper."""

IGNORE_FILE = ".offloadignore"
_LAST_WORDS = (
    AccessDeniedError, ContextError, NotFoundError, QuotaExceededError, UsageError, VersionError,
)  # fmt: skip
"""What does not become better by another attempt."""
_RECONNECT_SECONDS = 30.0
"""Whoever waits for both sides to be the same waits so long for a lost connection."""


class _NewRulesError(Exception):
    """The ignore file has changed."""


class SyncedDirectory:
    """Keeps one directory the same; started by `start`, ended by `aclose`.

    Attributes:
        path: of the copy, in the engine.
        source: on this machine.
    """

    def __init__(
        self,
        source: Source,
        open_call: Callable[[], Awaitable[SyncCall]],
        ids: tuple[int, int],
        settings: BindSettings,
        warn: Callable[[str], None],
    ) -> None:
        self.source = source
        self.path = ""
        self._open_call = open_call
        self._ids = ids
        self._settings = settings
        self._warn = warn
        self._wake = asyncio.Event()
        self._merging = Merging(only=source.only, warn=self._warn_here, wake=self._wake.set)
        self._live: LiveReplica | None = None
        self._link: SyncLink | None = None
        self._listed = asyncio.Event()
        self._connected = asyncio.Event()
        self._back_off = BackOff()
        self._sequence = 0
        self._state_id = ""
        self._tree_id = ""
        self._patterns: list[str] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._ended: OffloadError | None = None
        self._tasks = TaskSet(self._failed)
        self._break: Callable[[BaseException], None] = lambda _: None
        self._traffic = [0, 0]
        self._same_once = self._same_now = False
        self._mode = -1
        """Of the directory itself, as the session has it."""

    @property
    def two_way(self) -> bool:
        """Whether what containers write comes back."""
        return self._merging.two_way

    @property
    def ended(self) -> bool:
        """Whether it is not synchronised any more."""
        return self._ended is not None

    def describe(self) -> dict[str, Any]:
        """Return how it stands, for people: its path, state, files on both sides, and traffic."""
        if self._ended is not None:
            state = "ended"
        elif self._link is None:
            state = "reconnecting" if self._same_once else "starting"
        elif self._same_now:
            state = "same"
        else:
            state = "copying" if self._same_once else "starting"
        return {
            "path": str(self.source.path),
            "two_way": self.two_way,
            "state": state,
            "entries_here": len(self._merging.here),
            "entries_there": len(self._merging.there),
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "problem": self._ended.message if self._ended is not None else "",
        }

    def has(self, relative: str) -> bool:
        """Return whether a directory below is a part of the copy, and is not ignored."""
        entry = self._merging.here.get(relative)
        return entry is not None and entry.is_directory

    @property
    def sent_bytes(self) -> int:
        """Bytes of content that went to the session, as they travelled."""
        link = self._link
        return self._traffic[0] + (link.exchange.sent_bytes if link is not None else 0)

    @property
    def received_bytes(self) -> int:
        """Bytes of content that came from the session, as they travelled."""
        link = self._link
        return self._traffic[1] + (link.exchange.received_bytes if link is not None else 0)

    def follows(self, former: SyncedDirectory) -> None:
        """Know what another one knew whose directory was replaced by this one.

        What was deleted here with it is deleted in the session too, and does not come back.
        """
        self._merging.base = former._merging.base
        self._tree_id = former._tree_id

    async def start(self, *, two_way: bool) -> None:
        """Begin, and wait until both sides are the same.

        Raises:
            OffloadError: it cannot be synchronised; nothing goes on.
        """
        self._merging.two_way = two_way
        same = self._same()
        self._tasks.start(self._run(), name="sync-directory")
        await same

    def take_back(self) -> None:
        """From now on, what containers write comes back."""
        if not self._merging.two_way:
            self._merging.two_way = True
            self._merging.compare_all()
            self._wake.set()

    async def settle(self, *, there: bool) -> None:
        """Wait until what has happened so far is on the other side.

        Args:
            there: also what has happened in the session.

        Raises:
            OffloadError: the directory is not synchronised any more, or the connection is lost.
        """
        while True:
            if await self._flushed(there=there):
                break
            # Once more, for the connection was lost meanwhile, which is heard of a little later.
            await asyncio.sleep(FIRST_SECONDS / 2)
        same = self._same()
        self._wake.set()
        await same

    async def _flushed(self, *, there: bool) -> bool:
        try:
            async with asyncio.timeout(_RECONNECT_SECONDS):
                await self._connected.wait()
        except TimeoutError as error:
            raise NodeLostError(
                f"{self.source.path} is not up to date: the connection to the session is lost"
            ) from error
        if self._ended is not None:
            raise self._ended
        live, link = self._live, self._link
        if live is None or link is None:
            return False
        try:
            await live.flush()
        except OffloadError as error:
            self._break(error)
            if isinstance(error, _LAST_WORDS):
                self._end(error)
            raise
        if there:
            try:
                await link.flush()
            except NodeLostError:
                return False
        return True

    async def aclose(self) -> None:
        """Stop; harmless when done twice."""
        await self._tasks.close()
        self._merging.close()
        self._end(NodeLostError("the session's directories are not synchronised any more"))

    # The life of it.

    def _same(self) -> asyncio.Future[None]:
        if self._ended is not None:
            raise self._ended
        same: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(same)
        return same

    async def _run(self) -> None:
        while True:
            try:
                with contextlib.suppress(_NewRulesError):
                    await self._follow()
            except OffloadError as error:
                self._end(error)
                return
            except OSError as error:
                self._end(
                    NotFoundError(f"cannot read {self.source.root}: {error.strerror or error}")
                )
                return

    def _end(self, error: OffloadError) -> None:
        if self._ended is None:
            self._ended = error
            if self.path and not isinstance(error, NodeLostError):
                self._warn(f"{self.source.path} is not synchronised any more: {error.message}")
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()
        self._connected.set()

    def _failed(self, _: str, error: BaseException) -> None:
        log.error("synchronising a directory failed: %r", error)
        self._end(NodeLostError(f"{self.source.path} is not synchronised any more: {error}"))

    async def _follow(self) -> None:
        """Follow this side with one set of rules."""
        self._patterns = self._read_patterns()
        rules = Rules(self._patterns, self.source.only)
        known = self._known()
        broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        def failed(error: BaseException) -> None:
            if not broken.done():
                broken.set_result(error)

        self._break = failed
        try:
            live = LiveReplica(self.source.root, rules, self._settings.limits, known=known)
            async with live:
                self._live = live
                self._merging.base = {
                    path: entry
                    for path, entry in self._merging.base.items()
                    if rules.wanted(path, is_directory=entry.is_directory)
                }
                live.follow(self._wake.set, failed)
                await self._connect_again(live, broken)
        finally:
            self._live = None
            if known is not None:
                known.close()

    def _known(self) -> IndexedDigests | None:
        if self._settings.index is None:
            return None
        return IndexedDigests(self._settings.index, self.source.root)

    def _read_patterns(self) -> list[str]:
        if self.source.only:
            return []
        path = self.source.root / IGNORE_FILE
        try:
            return parse_ignore_file(path.read_bytes(), name=str(path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ContextError(f"cannot read {path}: {error.strerror}") from error

    async def _connect_again(
        self, live: LiveReplica, broken: asyncio.Future[BaseException]
    ) -> None:
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._connect(live, broken)
            except _LAST_WORDS:
                raise
            except OffloadError as error:
                if not self.path:
                    raise
                log.debug("synchronising goes on in a moment: %s", error.message)
            took = asyncio.get_running_loop().time() - began
            await asyncio.sleep(self._back_off.after(took))

    async def _connect(self, live: LiveReplica, broken: asyncio.Future[BaseException]) -> None:
        loop = asyncio.get_running_loop()
        link = SyncLink(
            await self._open_call(),
            live,
            opened=self._told_opened,
            changes=self._told,
            warn=self._warn_there,
        )
        self._listed.clear()
        reading = loop.create_task(link.run())
        merging = loop.create_task(self._merge(live, link))
        try:
            await asyncio.wait(
                (reading, merging, link.lost, broken), return_when=asyncio.FIRST_COMPLETED
            )
            for future in (link.lost, broken):
                if future.done():
                    raise future.result()
            # Why the call has ended says more than what became of those who used it.
            for task in (reading, merging):
                if task.done():
                    task.result()
        finally:
            self._connected.clear()
            self._link = None
            self._traffic[0] += link.exchange.sent_bytes
            self._traffic[1] += link.exchange.received_bytes
            try:
                await link.aclose()
            finally:
                await stop(reading, merging, expected=(Exception,))

    def _told_opened(self, opened: SyncOpened) -> None:
        if opened.state_id != self._state_id:
            # Everything is listed anew.
            self._merging.there = {}
            self._state_id = opened.state_id

    def _told(self, news: Listing, sequence: int, complete: bool) -> None:
        self._merging.note_there(news)
        if complete:
            self._sequence = sequence
            self._listed.set()
            self._wake.set()

    async def _merge(self, live: LiveReplica, link: SyncLink) -> None:
        """Do what is to be done on both sides, for as long as the connection lasts."""
        user_id, group_id = self._ids
        opened = await link.open(
            SyncOpen(
                root_id=self._root_id(),
                user_id=user_id,
                group_id=group_id,
                ignored=[os.fsencode(pattern) for pattern in self._patterns],
                only=os.fsencode(self.source.only),
                max_files=self._settings.limits.files,
                max_bytes=self._settings.limits.size_bytes,
                state_id=self._state_id,
                sequence=self._sequence,
            )
        )
        await self._listed.wait()
        if opened.tree_id != self._tree_id or (self._merging.base and not self._merging.there):
            # This copy never had what is missing in it: nothing is deleted here because of it.
            self._merging.base = {}
        self._tree_id = opened.tree_id
        # All of it, for the end of the connection before may have taken some changes along.
        self._merging.here = await live.take_all()
        self._merging.compare_all()
        self.path = opened.path
        self._link = link
        self._mode = -1
        self._back_off.reached()
        self._connected.set()
        while True:
            await self._rounds(live, link)
            await self._wake.wait()
            self._wake.clear()

    def _root_id(self) -> str:
        parts = (socket.gethostname(), str(os.getuid()), str(self.source.path))
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    async def _rounds(self, live: LiveReplica, link: SyncLink) -> None:
        """Go on until both sides are the same."""
        merging = self._merging
        while True:
            waiting, self._waiting = self._waiting, []
            try:
                news = await live.take()
                merging.note_here(news)
                for path in await live.take_kept():
                    self._warn_here(f"a version that was just written here is kept as {path}")
                await self._give_mode(link)
                if IGNORE_FILE in news and self._read_patterns() != self._patterns:
                    raise _NewRulesError
                plan = merging.plan()
                self._same_now = not plan.here and not plan.there
                if self._same_now:
                    self._same_once = True
                    for future in waiting:
                        if not future.done():
                            future.set_result(None)
                    waiting = []
                    return
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._apply_there(link, plan.there))
                    group.create_task(self._apply_here(link, plan.here))
            except ExceptionGroup as failed:
                raise _first_error(failed) from failed
            finally:
                self._waiting = waiting + self._waiting

    async def _give_mode(self, link: SyncLink) -> None:
        # The directory of a file that is mounted by itself is nobody's business there.
        mode = 0 if self.source.only else stat.S_IMODE(self.source.root.stat().st_mode) & 0o777
        if mode and mode != self._mode:
            await link.set_directory_mode(mode)
            self._mode = mode

    async def _apply_there(self, link: SyncLink, operations: Sequence[Operation]) -> None:
        if operations:
            self._merging.done_there(operations, await link.apply(operations))

    async def _apply_here(self, link: SyncLink, operations: Sequence[Operation]) -> None:
        for start in range(0, len(operations), BATCH_OPERATIONS):
            some = operations[start : start + BATCH_OPERATIONS]
            self._merging.done_here(some, await link.exchange.apply(some))

    def _warn_here(self, sentence: str) -> None:
        self._warn(f"{self.source.root}: {sentence}")

    def _warn_there(self, sentence: str) -> None:
        self._warn(f"{self.source.root} in the session: {sentence}")


def _first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    for error in failed.exceptions:
        return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
    return failed
