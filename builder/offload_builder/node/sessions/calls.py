"""Open calls of members to sessions: who has them, which count as use, and how they are ended."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from offload_core.aio import stop
from offload_core.errors import QuotaExceededError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Coroutine, Iterator

    from offload_core.errors import OffloadError

T = TypeVar("T")

MAX_CALLS = 1024
"""Of one member at a node, and of one session, at a time."""
END_SECONDS = 2.0
"""For a call that is ended to say why, while its client takes nothing."""


class SessionCall:
    """One call, for as long as it is open.

    Attributes:
        member: who calls.
        counts: it is use of the session.
        error: why it is ended by the node.
        ended: set when the node ends it.
    """

    def __init__(self, member: str, changed: Callable[[], None], *, counts: bool) -> None:
        self.member = member
        self.counts = counts
        self.error: OffloadError | None = None
        self.ended = asyncio.Event()
        self._never = False
        self._changed = changed
        self._cut: Callable[[], None] | None = None
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def count(self) -> None:
        """Take it for use from now on."""
        if not (self.counts or self._never):
            self.counts = True
            self._changed()

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
        if self._timer is not None:
            self._timer.cancel()


class OpenCalls:
    """Of one session."""

    def __init__(self, of_members: Counter[str], changed: Callable[[], None]) -> None:
        """Count calls of members at the whole node in `of_members`."""
        self._of_members = of_members
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
        call = SessionCall(member, self._changed, counts=counts)
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
