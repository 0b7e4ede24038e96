"""What both sides of a directory had, have, and are to have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_core.treesync.decisions import Operation, Plan, decide
from offload_core.treesync.entries import ABSENT, Entry, Listing, parent_of, update
from offload_proto.v1.session_sync_service_pb2 import (
    SYNC_OUTCOME_CHANGED,
    SYNC_OUTCOME_DONE,
    SYNC_OUTCOME_FULL,
    SYNC_OUTCOME_STALE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_core.treesync.applying import Result

_STALE_SECONDS = 0.3
_BLOCKED_SECONDS = 2.0
_FULL_SECONDS = 5.0
_NAMED = 3


class Merging:
    """The listings of both sides; for the event loop.

    Attributes:
        here: what this side has.
        there: what the node has.
        base: what both had when they were last the same.
        dirty: paths that are to be compared.
        two_way: changes of the node come here.
    """

    def __init__(self, *, only: str, warn: Callable[[str], None], wake: Callable[[], None]) -> None:
        """Prepare.

        Args:
            only: the one file that is meant; empty for all of the directory.
            warn: told sentences that people should read.
            wake: called when something is to be tried again.
        """
        self.here: Listing = {}
        self.there: Listing = {}
        self.base: Listing = {}
        self.dirty: set[str] = set()
        self.two_way = False
        self._only = only
        self._warn = warn
        self._wake = wake
        self._resting: dict[str, tuple[Entry, Entry]] = {}
        self._warned: set[str] = set()
        self._timers: set[asyncio.TimerHandle] = set()

    def close(self) -> None:
        """Try nothing again."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def note_here(self, news: Listing) -> None:
        """Take over what has changed on this side."""
        update(self.here, news)
        self.dirty.update(news)

    def note_there(self, news: Listing) -> None:
        """Take over what has changed at the node."""
        update(self.there, news)
        self.dirty.update(news)

    def compare_all(self) -> None:
        """Compare everything."""
        self.dirty.update(self.here, self.there, self.base)

    def plan(self) -> Plan:
        """Return what is to be done for the paths that may differ."""
        paths, self.dirty = self.dirty, set()
        if self._only:
            paths = self._without_deletion(paths)
        paths = self._with_kin(paths)
        plan = decide(paths, self.base, self.here, self.there, two_way=self.two_way)
        update(self.base, plan.settled)
        self.dirty.update(plan.later)
        for path in plan.settled:
            self._resting.pop(path, None)
        both = [path for path in plan.blocked if path in self.here and path in self.there]
        if both:
            self._say(
                f"{_named(both)} cannot be synchronised, because it is a socket, a pipe, a device "
                "or not readable on one side"
            )
        plan.here = [item for item in plan.here if not self._rests(item.path)]
        plan.there = [item for item in plan.there if not self._rests(item.path)]
        return plan

    def _with_kin(self, paths: set[str]) -> set[str]:
        """Return paths with those that are decided together with them.

        These are the directories above them, and what is below a directory that is to go.
        """
        found = set(paths)
        for path in paths:
            parent = parent_of(path)
            while parent and parent not in found:
                found.add(parent)
                parent = parent_of(parent)
        going = {path for path in found if self._is_going(path)}
        if going:
            for path in {*self.here, *self.there, *self.base}:
                parent = parent_of(path)
                while parent:
                    if parent in going:
                        found.add(path)
                        break
                    parent = parent_of(parent)
        return found

    def _is_going(self, path: str) -> bool:
        """Return whether a path is a directory on one side, and was or is something else."""
        here, there = self._state(path)
        if here.is_directory == there.is_directory:
            return False
        return path in self.base or ABSENT not in (here, there)

    def _without_deletion(self, paths: set[str]) -> set[str]:
        """A container keeps a file that is mounted by itself, as with every docker engine."""
        if self._only not in self.here:
            return set()
        if self._only not in self.there:
            self.base.pop(self._only, None)
        return paths

    def _rests(self, path: str) -> bool:
        state = self._resting.get(path)
        if state is None:
            return False
        if state == self._state(path):
            return True
        del self._resting[path]
        return False

    def _state(self, path: str) -> tuple[Entry, Entry]:
        return self.here.get(path, ABSENT), self.there.get(path, ABSENT)

    def done_there(self, operations: Sequence[Operation], results: Sequence[Result]) -> None:
        """Take over what became of operations at the node."""
        for operation, result in zip(operations, results, strict=True):
            update(self.there, {operation.path: result.now})
            self._done(operation, result, "the session")
            if operation.aside and result.outcome == SYNC_OUTCOME_DONE:
                folder = operation.path.rpartition("/")[0]
                kept = f"{folder}/{operation.aside}" if folder else operation.aside
                self._warn(
                    f"{operation.path} was changed here and in the session; the session's "
                    f"version is kept as {kept}"
                )

    def done_here(self, operations: Sequence[Operation], results: Sequence[Result]) -> None:
        """Take over what became of operations on this side."""
        for operation, result in zip(operations, results, strict=True):
            update(self.here, {operation.path: result.now})
            self._done(operation, result, "this machine")

    def _done(self, operation: Operation, result: Result, side: str) -> None:
        path = operation.path
        self.dirty.add(path)
        if result.outcome == SYNC_OUTCOME_DONE:
            if not operation.aside:
                update(self.base, {path: operation.wanted})
            self._warned.discard(side)
            return
        if result.outcome == SYNC_OUTCOME_CHANGED:
            if result.now != operation.expected:
                return
            if operation.wanted == ABSENT and operation.expected.is_directory:
                # Something that is not synchronised is in it, so it stays, on both sides.
                self.base.pop(path, None)
                return
            self._rest(path, _BLOCKED_SECONDS)
        elif result.outcome == SYNC_OUTCOME_STALE:
            self._rest(path, _STALE_SECONDS)
        elif result.outcome == SYNC_OUTCOME_FULL:
            self._rest(path, _FULL_SECONDS)
            if side not in self._warned:
                self._warned.add(side)
                self._warn(
                    f"the disk of {side} is full: {path} is not up to date there, and follows "
                    "once there is room"
                )
        else:
            self._rest(path, None)
            self._say(f"{path} cannot be written in {side}: {result.reason or 'it failed'}")

    def _rest(self, path: str, seconds: float | None) -> None:
        """Leave a path as it is until it changes, or for some time."""
        state = self._resting[path] = self._state(path)
        if seconds is None:
            return

        def again() -> None:
            self._timers.discard(timer)
            if self._resting.get(path) == state:
                del self._resting[path]
            self.dirty.add(path)
            self._wake()

        timer = asyncio.get_running_loop().call_later(seconds, again)
        self._timers.add(timer)

    def _say(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._warn(sentence)


def _named(paths: Sequence[str]) -> str:
    shown = ", ".join(sorted(paths)[:_NAMED])
    return f"{shown} and {len(paths) - _NAMED} more" if len(paths) > _NAMED else shown
