"""Open calls of members to sessions: who has them, which count as use, and how they are ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from offload_builder.node.sessions.room import Room
from offload_core.aio import stop
from offload_core.errors import QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from offload_core.errors import OffloadError

T = TypeVar("T")

MAX_CALLS = 256
"""Of one member at a node, and of one session, at a time. Each may send a piece of 1 MiB that the
engine does not take."""
SESSION_BYTES = 64 << 20
"""On their way in all calls of a session."""
NODE_BYTES = 256 << 20
END_SECONDS = 2.0
"""For a call that is ended to say why, while its client takes nothing."""


@dataclass(frozen=True)
class NodeCalls:
    """What all sessions of a node have together.

    Attributes:
        of_members: open calls of each member.
        room: for bytes on their way.
    """

    of_members: Counter[str] = field(default_factory=Counter)
    room: Room = field(default_factory=lambda: Room(NODE_BYTES))


class SessionCall:
    """One call, for as long as it is open.

    Attributes:
        member: who calls.
        counts: it is use of the session.
        error: why it is ended by the node.
        ended: set when the node ends it.
    """

    def __init__(
        self, member: str, changed: Callable[[], None], room: Room, *, counts: bool
    ) -> None:
        self.member = member
        self.counts = counts
        self.error: OffloadError | None = None
        self.ended = asyncio.Event()
        self._never = False
        self._changed = changed
        self._room = room
        self._held = 0
        self._cut: Callable[[], None] | None = None
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def count(self) -> None:
        """Take it for use from now on."""
        if not (self.counts or self._never):
            self.counts = True
            self._changed()

    @property
    def piece(self) -> int:
        """How many bytes it may take at once now."""
        return self._room.piece()

    def hold(self, size: int) -> None:
        """Have so many more bytes on their way; fewer when it is negative."""
        self._held += size
        self._room.take(size)

    def never_count(self) -> None:
        """Never take it for use."""
        self._never = True

    def on_end(self, cut: Callable[[], None]) -> None:
        """Set what lets pending reads come to their end when the call is ended."""
        self._cut = cut
        if self.error is not None:
            cut()

    def end(self, error: OffloadError) -> None:
        """End the call with an error; the first one holds."""
        if self.error is not None:
            return
        self.error = error
        self.ended.set()
        if self._cut is not None:
            self._cut()
        if self._task is not None:
            # Also where it waits for a client that takes nothing.
            self._timer = asyncio.get_running_loop().call_later(END_SECONDS, self._task.cancel)

    async def unless_ended(self, waiting: Coroutine[Any, Any, T]) -> T:
        """Wait for something, but not beyond the end of the call.

        Raises:
            OffloadError: the node has ended it.
        """
        wanted = asyncio.ensure_future(waiting)
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait((wanted, ended), return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return wanted.result()
        finally:
            await stop(wanted, ended, expected=(Exception,))

    def check(self) -> None:
        """Raise the error that the call was ended with, if it was."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Hear that the call is over."""
        self.hold(-self._held)
        if self._timer is not None:
            self._timer.cancel()


class OpenCalls:
    """Of one session.

    Attributes:
        room: for bytes on their way in them.
    """

    def __init__(self, node: NodeCalls, changed: Callable[[], None]) -> None:
        """Count them among those of the node."""
        self._of_members = node.of_members
        self.room = Room(SESSION_BYTES, node.room)
        self._changed = changed
        self._calls: set[SessionCall] = set()

    @property
    def open_calls(self) -> int:
        """How many there are."""
        return len(self._calls)

    @property
    def counting(self) -> int:
        """How many open calls are use."""
        return sum(call.counts for call in self._calls)

    @contextmanager
    def open(self, member: str, *, counts: bool) -> Iterator[SessionCall]:
        """Keep a call while the block runs, in its task.

        Raises:
            QuotaExceededError: there are too many.
        """
        if self._of_members[member] >= MAX_CALLS:
            raise QuotaExceededError(f"{member} has {MAX_CALLS} connections to this node already")
        if len(self._calls) >= MAX_CALLS:
            raise QuotaExceededError(f"this session has {MAX_CALLS} connections already")
        call = SessionCall(member, self._changed, self.room, counts=counts)
        self._of_members[member] += 1
        self._calls.add(call)
        if counts:
            self._changed()
        try:
            yield call
        finally:
            call.close()
            self._calls.discard(call)
            self._of_members[member] -= 1
            if not self._of_members[member]:
                del self._of_members[member]
            if call.counts:
                self._changed()

    def end(self, error: OffloadError, *, of: Callable[[str], bool] = lambda _: True) -> None:
        """End the calls of all members, or of those that `of` says."""
        for call in list(self._calls):
            if of(call.member):
                call.end(error)
