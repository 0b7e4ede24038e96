"""The node's copy of one directory: lists itself, and does what the client has decided."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from offload_core.aio import TaskSet
from offload_core.errors import NodeLostError, OffloadError, UsageError
from offload_core.treesync.content import zstd_usable
from offload_core.treesync.decisions import Operation
from offload_core.treesync.entries import check_path, from_message, to_message
from offload_core.treesync.exchange import Exchange
from offload_core.treesync.live import LiveReplica
from offload_core.treesync.replica import Limits
from offload_core.treesync.rules import Rules
from offload_proto.v1.session_sync_service_pb2 import (
    SyncApplied,
    SyncChanges,
    SyncFlushed,
    SyncOpened,
    SyncResponse,
    SyncResult,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_core.treesync.entries import Listing
    from offload_proto.v1.session_sync_service_pb2 import (
        SyncApply,
        SyncContent,
        SyncOpen,
        SyncRequest,
        SyncWant,
    )

FILES = "files"
"""Directory that containers see, below that of the synchronised directory."""
TREE_ID = "tree-id"
_ENTRIES_PER_MESSAGE = 1000
_MAX_OPERATIONS = 2000
_MAX_FILES = 1_000_000
"""Whatever the client allows: some 500 MB of this process's memory."""


class NodeSide:
    """One directory; it outlives the connections of its client. Closed by its owner.

    Args:
        place: directory for it, in the session; made when missing.
        shown: the same, as it is called in the session.
        send: writes a message to the client.
        failed: hears why the directory cannot be synchronised any more.
    """

    def __init__(
        self,
        place: Path,
        shown: str,
        send: Callable[[SyncResponse], Awaitable[None]],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._place = place
        self._shown = shown
        self._send = send
        self._failed = failed
        self._live: LiveReplica | None = None
        self._described: tuple[object, ...] = ()
        self._exchange: Exchange | None = None
        self._state_id = ""
        self._tree_id = ""
        self._sequence = 0
        self._changed_at: dict[str, int] = {}
        self._news: Listing = {}
        self._tasks = TaskSet(self._task_failed)
        self._publishing = False
        self._telling = asyncio.Lock()
        """What is said of one path is said in the order in which it happened."""

    async def aclose(self) -> None:
        """End everything; the files stay."""
        await self.disconnected()
        if self._live is not None:
            await self._live.aclose()
            self._live = None

    async def disconnected(self) -> None:
        """Hear that the client is gone; what is known stays for when it comes back."""
        exchange, self._exchange = self._exchange, None
        await self._tasks.close()
        if exchange is not None:
            await exchange.close()

    async def handle(self, request: SyncRequest) -> None:
        """Do what the client says; never waits for the client.

        Raises:
            OffloadError: the connection must end.
        """
        kind = request.WhichOneof("message")
        if kind == "open":
            await self._open(request.open)
            return
        exchange = self._exchange
        if exchange is None:
            raise UsageError("the first message of this call must be SyncOpen")
        if kind == "apply":
            self._tasks.start(self._apply(request.apply), name="sync-apply")
        elif kind == "flush":
            self._tasks.start(self._flush(request.flush.id), name="sync-flush")
        elif kind == "want":
            exchange.wanted(request.want)
        elif kind == "content":
            await exchange.content(request.content)
        elif kind == "directory_mode":
            with contextlib.suppress(OSError):
                (self._place / FILES).chmod(request.directory_mode & 0o777)

    async def _open(self, message: SyncOpen) -> None:
        await self.disconnected()
        only = check_path(message.only) if message.only else ""
        patterns = [os.fsdecode(pattern) for pattern in message.ignored]
        limits = Limits(min(message.max_files, _MAX_FILES), message.max_bytes)
        described = (only, *patterns, limits, message.user_id, message.group_id)
        if self._live is None or described != self._described:
            await self._start(Rules(patterns, only), limits, (message.user_id, message.group_id))
            self._described = described
        live = self._live
        if live is None:
            raise NodeLostError("the directory cannot be synchronised")
        self._exchange = Exchange(
            live.thread,
            live.replica,
            send_want=self._send_want,
            send_content=self._send_content,
            zstd=message.zstd and zstd_usable(),
            in_place=bool(only),
            failed=self._failed,
        )
        self._tasks = TaskSet(self._task_failed)
        self._publishing = False
        self._news = {}
        resumed = message.state_id == self._state_id and message.sequence <= self._sequence
        path = f"{self._shown}/{FILES}"
        await self._send(
            SyncResponse(
                opened=SyncOpened(
                    path=f"{path}/{only}" if only else path,
                    state_id=self._state_id,
                    tree_id=self._tree_id,
                )
            )
        )
        await self._collect()
        known = message.sequence if resumed else -1
        self._news = {
            path: live.replica.entry(path)
            for path, at in self._changed_at.items()
            if at > known and (resumed or path in live.replica.entries)
        }
        self._tasks.start(self._publish_listing(), name="sync-listing")

    async def _publish_listing(self) -> None:
        async with self._telling:
            await self._publish(even_nothing=True)

    async def _start(self, rules: Rules, limits: Limits, owner: tuple[int, int]) -> None:
        if self._live is not None:
            await self._live.aclose()
            self._live = None
        files = self._place / FILES
        try:
            self._tree_id = _prepare(self._place, files, owner)
            live = LiveReplica(files, rules, limits, owner=_usable_owner(owner))
        except OSError as error:
            raise NodeLostError(
                f"the session cannot hold the directory: {error.strerror}"
            ) from error
        self._live = await live.__aenter__()
        self._state_id = secrets.token_hex(8)
        self._sequence = 0
        self._changed_at = {}
        live.follow(self._changed, self._failed)

    def _changed(self) -> None:
        if self._exchange is not None and not self._publishing:
            self._publishing = True
            self._tasks.start(self._publish_changes(), name="sync-changes")

    async def _publish_changes(self) -> None:
        self._publishing = False
        async with self._telling:
            await self._collect()
            await self._publish()

    async def _collect(self) -> None:
        """Number what has changed, and keep it for the client."""
        if self._live is None:
            return
        self._news.update(await self._live.thread.run(self._number, self._live))
        for path in await self._live.take_kept():
            await self._send(
                SyncResponse(
                    warning=f"a container wrote {path.rpartition('.conflict-')[0]} while it was "
                    f"replaced; its version is kept as {path}"
                )
            )

    def _number(self, live: LiveReplica) -> Listing:
        """Take the changes; in the thread, so that a client that goes meanwhile loses none."""
        found = live.take_now()
        for path in found:
            self._sequence += 1
            self._changed_at[path] = self._sequence
        return found

    async def _publish(self, *, even_nothing: bool = False) -> None:
        news, self._news = self._news, {}
        if not news and not even_nothing:
            return
        items = list(news.items())
        sequence = self._sequence
        for start in range(0, max(len(items), 1), _ENTRIES_PER_MESSAGE):
            some = items[start : start + _ENTRIES_PER_MESSAGE]
            more = start + _ENTRIES_PER_MESSAGE < len(items)
            await self._send(
                SyncResponse(
                    changes=SyncChanges(
                        entries=[to_message(path, entry) for path, entry in some],
                        sequence=0 if more else sequence,
                        more=more,
                    )
                )
            )

    async def _apply(self, message: SyncApply) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if len(message.operations) > _MAX_OPERATIONS:
            raise UsageError("too many operations at once")
        operations: list[Operation] = []
        for item in message.operations:
            path, wanted = from_message(item.wanted)
            _, expected = from_message(item.expected)
            aside = check_path(item.aside) if item.aside else ""
            if "/" in aside:
                raise UsageError("a name with a / was asked for")
            operations.append(Operation(path, wanted, expected, aside))
        results = await exchange.apply(operations)
        live = self._live
        if live is None:
            return
        async with self._telling:
            await self._collect()
            # What is there now, for a container may have gone on meanwhile.
            paths = [operation.path for operation in operations]
            entries = await live.thread.run(lambda: list(map(live.replica.entry, paths)))
            for path, entry in zip(paths, entries, strict=True):
                if self._news.get(path) == entry:
                    # The answer says it.
                    del self._news[path]
            await self._publish()
            answers = [
                SyncResult(
                    now=to_message(path, entry), outcome=result.outcome, reason=result.reason
                )
                for path, entry, result in zip(paths, entries, results, strict=True)
            ]
            await self._send(SyncResponse(applied=SyncApplied(id=message.id, results=answers)))

    async def _flush(self, number: int) -> None:
        if self._live is not None:
            await self._live.flush()
        async with self._telling:
            await self._collect()
            await self._publish()
        await self._send(SyncResponse(flushed=SyncFlushed(id=number)))

    async def _send_want(self, want: SyncWant) -> None:
        await self._send(SyncResponse(want=want))

    async def _send_content(self, content: SyncContent) -> None:
        await self._send(SyncResponse(content=content))

    def _task_failed(self, _: str, error: BaseException) -> None:
        if not isinstance(error, OffloadError) or not error.retryable:
            self._failed(error)


def _prepare(place: Path, files: Path, owner: tuple[int, int]) -> str:
    """Make the directory; return the name of this copy."""
    place.mkdir(parents=True, exist_ok=True)
    if not files.is_dir():
        files.mkdir()
        os.chown(files, *(_usable_owner(owner) or (-1, -1)))
        (place / TREE_ID).unlink(missing_ok=True)
    kept = place / TREE_ID
    try:
        if found := kept.read_bytes():
            return found.decode("ascii", "replace")
    except FileNotFoundError:
        pass
    name = secrets.token_hex(16)
    kept.write_bytes(name.encode())
    return name


def _usable_owner(owner: tuple[int, int]) -> tuple[int, int] | None:
    """Return the owner as far as this user namespace has it: others are root's."""
    if os.geteuid() != 0:
        return None
    return _mapped("uid", owner[0]), _mapped("gid", owner[1])


def _mapped(kind: str, number: int) -> int:
    try:
        lines = Path(f"/proc/self/{kind}_map").read_bytes().splitlines()
    except OSError:
        return number if number < _ENGINE_IDS else 0
    for line in lines:
        first, _, count = map(int, line.split())
        if first <= number < first + count:
            return number
    return 0


_ENGINE_IDS = 65_536
"""Of an engine, from 0 on; where /proc is that of another namespace the map cannot be read."""
