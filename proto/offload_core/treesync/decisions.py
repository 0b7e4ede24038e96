"""What is to be done on which side: the three-way decision. Pure.

The base is what both sides had when they were last the same. A side that still has it has not
changed, and takes what the other has. When both have changed, the client's version wins, and the
node's is given another name first, under which it then comes to the client like any new file.
A deletion never wins over a change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from offload_core.treesync.entries import ABSENT, OTHER, Entry, Listing, parent_of
from offload_core.treesync.tree import conflict_name

if TYPE_CHECKING:
    from collections.abc import Iterable


class Operation(NamedTuple):
    """One thing to be done on one side.

    Attributes:
        path: where.
        wanted: what is to be there.
        expected: what must be there before.
        aside: instead, the name that what is there is given.
    """

    path: str
    wanted: Entry
    expected: Entry
    aside: str = ""


@dataclass
class Plan:
    """What is to be done now; the rest follows once it is done.

    Attributes:
        here: on the client's side, in order.
        there: on the node's side, in order.
        settled: paths where both sides are the same, and what is there.
        conflicts: paths of which two versions are kept.
        blocked: paths that cannot be synchronised because of what is there.
        later: paths that are to be compared again once this was done.
    """

    here: list[Operation] = field(default_factory=list)
    there: list[Operation] = field(default_factory=list)
    settled: dict[str, Entry] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)


def decide(
    paths: Iterable[str], base: Listing, here: Listing, there: Listing, *, two_way: bool
) -> Plan:
    """Compare paths on both sides.

    Args:
        paths: that may differ.
        base: what both had.
        here: what the client has.
        there: what the node has.
        two_way: changes of the node count; otherwise they are undone.
    """
    plan = Plan()
    to_here: dict[str, Operation] = {}
    to_there: dict[str, Operation] = {}
    for path in paths:
        old, mine, theirs = (side.get(path, ABSENT) for side in (base, here, there))
        if OTHER in (mine, theirs):
            if mine != theirs:
                plan.blocked.append(path)
        elif mine == theirs:
            plan.settled[path] = mine
        elif not two_way or theirs == old:
            to_there[path] = Operation(path, mine, theirs)
        elif mine in (old, ABSENT):
            to_here[path] = Operation(path, theirs, mine)
        elif theirs == ABSENT or mine.same_content(theirs):
            to_there[path] = Operation(path, mine, theirs)
        else:
            to_there[path] = _aside(path, theirs)
    _keep_parents(to_here, to_there, here, there)
    plan.later = _leave_moved(to_here, to_there)
    plan.here = _ordered(to_here)
    plan.there = _ordered(to_there)
    plan.conflicts = [operation.path for operation in plan.there if operation.aside]
    return plan


def _aside(path: str, theirs: Entry) -> Operation:
    return Operation(path, theirs, theirs, conflict_name(path.rpartition("/")[2]))


def _keep_parents(
    to_here: dict[str, Operation], to_there: dict[str, Operation], here: Listing, there: Listing
) -> None:
    """Do not delete or replace a directory on one side that has something new for the other."""
    for path in _parents(to_there):
        # The client has something new in it.
        operation = to_here.get(path)
        if operation is None or operation.wanted.is_directory:
            continue
        del to_here[path]
        theirs, mine = there.get(path, ABSENT), here.get(path, ABSENT)
        if theirs == ABSENT:
            to_there[path] = Operation(path, mine, theirs)
        else:
            to_there[path] = _aside(path, theirs)
    for path in _parents(to_here):
        # The node has something new in it.
        operation = to_there.get(path)
        if operation is None or operation.aside or operation.wanted.is_directory:
            continue
        theirs, mine = there.get(path, ABSENT), here.get(path, ABSENT)
        if not theirs.is_directory:
            continue
        if mine == ABSENT:
            del to_there[path]
            to_here[path] = Operation(path, theirs, mine)
        else:
            to_there[path] = _aside(path, theirs)


def _leave_moved(to_here: dict[str, Operation], to_there: dict[str, Operation]) -> list[str]:
    """Take out what is below something that gets another name: it moves with it."""
    moved = {path for path, operation in to_there.items() if operation.aside}
    left: list[str] = []
    if moved:
        for side in (to_here, to_there):
            below = [path for path in side if _has_parent_in(path, moved)]
            left += below
            for path in below:
                del side[path]
    return left


def _parents(operations: dict[str, Operation]) -> list[str]:
    """Return the directories above what stays or comes, the deepest first."""
    found: set[str] = set()
    for path, operation in operations.items():
        if operation.wanted == ABSENT:
            continue
        parent = parent_of(path)
        while parent and parent not in found:
            found.add(parent)
            parent = parent_of(parent)
    return sorted(found, reverse=True)


def _has_parent_in(path: str, paths: set[str]) -> bool:
    parent = parent_of(path)
    while parent:
        if parent in paths:
            return True
        parent = parent_of(parent)
    return False


def _ordered(operations: dict[str, Operation]) -> list[Operation]:
    """Deletions first, the deepest ones before those above; then parents before their children."""
    gone = [item for item in operations.values() if item.wanted == ABSENT]
    rest = [item for item in operations.values() if item.wanted != ABSENT]
    gone.sort(key=lambda item: item.path, reverse=True)
    rest.sort(key=lambda item: item.path)
    return gone + rest
