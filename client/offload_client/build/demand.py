"""What the node still wants: files of listings and pieces of large files, by number."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WHOLE = -1
"""In the place of a large file: the number is itself that of an entry."""


class Item(NamedTuple):
    """One blob that the node wants."""

    request_id: int
    """Names the listing."""
    file: int
    """Entry of the large file whose piece is wanted, or `WHOLE`."""
    number: int
    """Of the piece in the chunk list, or of the entry: the file, or the chunk list of a large
    one."""

    @property
    def entry(self) -> int:
        """The entry concerned."""
        return self.number if self.file == WHOLE else self.file


class Wanted(NamedTuple):
    """Blobs of one listing, or pieces of one large file: four bytes each."""

    request_id: int
    file: int
    numbers: array[int]

    def items(self) -> Iterator[Item]:
        """Yield them one by one."""
        for number in self.numbers:
            yield Item(self.request_id, self.file, number)


def numbers(values: Iterable[int] = ()) -> array[int]:
    """Return numbers as a `Wanted` keeps them."""
    return array("I", values)


def append(parts: list[Wanted], item: Item) -> None:
    """Add an item to others, in order."""
    if not parts or parts[-1][:2] != item[:2]:
        parts.append(Wanted(item.request_id, item.file, numbers()))
    parts[-1].numbers.append(item.number)


class Demand:
    """A queue of blobs: filled by the event loop, emptied by one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Wanted] = deque()
        self._current: Iterator[Item] = iter(())
        self._unweighed: deque[Wanted] = deque()
        self._closed = False

    def add(self, wanted: Wanted) -> None:
        """Append blobs."""
        if wanted.numbers:
            with self._changed:
                self._waiting.append(wanted)
                self._unweighed.append(wanted)
                self._changed.notify()

    def put_back(self, parts: Iterable[Wanted]) -> None:
        """Want blobs again that were taken already; they come before all others."""
        with self._changed:
            self._waiting.extendleft(reversed(list(parts)))
            self._changed.notify()

    def close(self) -> None:
        """Make the thread end."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """Nothing more is wanted."""
        return self._closed

    def next(self, *, wait: bool) -> Item | None:
        """Return the next blob; None when it is closed, or nothing is wanted now.

        Args:
            wait: for something to be wanted.
        """
        if self._closed:
            return None
        for item in self._current:
            return item
        with self._changed:
            while wait and not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed or not self._waiting:
                return None
            self._current = self._waiting.popleft().items()
        return next(self._current)

    def unweighed(self, limit: int) -> list[Wanted]:
        """Return at least `limit` blobs, if there are, of those not returned here before."""
        found: list[Wanted] = []
        with self._changed:
            while limit > 0 and self._unweighed:
                wanted = self._unweighed.popleft()
                part = wanted.numbers[:limit]
                if len(part) < len(wanted.numbers):
                    rest = wanted.numbers[limit:]
                    self._unweighed.appendleft(Wanted(wanted.request_id, wanted.file, rest))
                found.append(Wanted(wanted.request_id, wanted.file, part))
                limit -= len(part)
        return found
