"""The contract of a store that all nodes of a pool share."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object; `modified_at` is in UTC."""

    key: str
    size_bytes: int
    modified_at: datetime


class ObjectStore(Protocol):
    """Objects by key, shared by nodes that do not know each other.

    Keys are relative paths as `offload_cache.keys` makes them. A write is atomic: readers see the
    old object, the new one or none, never a part; the last writer wins. A read sees every write
    that was finished before it. What comes back is *not* verified: that is the reader's work.

    Every method raises CacheUnavailableError when the store does not answer in time, refuses, or
    failed so often that it is not asked for a while. `timeout` is in seconds and counts as such a
    failure; without it the store's own patience holds. When a caller is cancelled or its deadline
    passes, the work may go on for some seconds in the background but has no further effect on a
    sink.
    """

    async def read(
        self,
        key: str,
        sink: Callable[[bytes], None],
        *,
        offset: int = 0,
        length: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Pass an object, or `length` bytes of it from `offset`, to `sink` in order.

        `sink` runs in a thread of the store; what it raises ends the read and is raised here.

        Returns:
            The bytes passed, which are all that the store announced.

        Raises:
            NotFoundError: there is no such object, or nothing at `offset`.
        """

    async def read_bytes(self, key: str, *, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return a small object.

        Raises:
            NotFoundError: there is no such object, or it is larger than `max_bytes`.
        """

    async def write_file(self, key: str, path: Path) -> int:
        """Store a file and return its bytes.

        Raises:
            NotFoundError: there is no such file.
        """

    async def write_bytes(self, key: str, data: bytes) -> None:
        """Store a small object."""

    async def stat(self, key: str, *, timeout: float | None = None) -> ObjectInfo | None:
        """Return what is known of an object, None when there is none."""

    async def list_objects(
        self, prefix: str, *, limit: int, start_after: str = "", timeout: float | None = None
    ) -> list[ObjectInfo]:
        """Return at most `limit` objects whose key begins with `prefix`, in key order.

        With `start_after`, only those whose key is greater.
        """

    async def create_bytes(self, key: str, data: bytes) -> bool:
        """Store a small object unless there is one by that key; of several callers one succeeds.

        `data` should differ from what any other caller would write, by an identifier of the
        caller: a store without conditional writes is asked afterwards whose data it has.

        Returns:
            Whether the object is the caller's. After CacheUnavailableError it may or may not be.
        """

    async def list_folders(self, prefix: str) -> list[str]:
        """Return the folders directly below `prefix` in order, with the prefix and a final slash.

        `list_folders("a/")` is `["a/b/", "a/c/"]` when there are objects `a/b/x`, `a/c/d/y` and
        `a/z`. `prefix` is empty or ends with a slash.
        """

    async def delete(self, key: str) -> None:
        """Remove an object; fine when there is none."""

    async def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects with as few requests as the store allows; fine when there are none.

        When it fails, some may be gone.
        """

    @property
    def reachable(self) -> bool:
        """Whether the next call is worth trying."""

    @property
    def state(self) -> str:
        """One sentence for people: whether the shared cache answers, and if not, why."""

    async def close(self) -> None:
        """End all work and free connections and threads."""


class SinkGate:
    """Lets pieces through to a sink until it is shut; afterwards no piece ever arrives.

    A thread cannot be cancelled; the gate makes sure that one whose caller has left does no harm.

    Attributes:
        sink_error: what the sink raised; no piece arrives after it.
        heard_at: when a piece came last, as `time.monotonic`.
    """

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._open = True
        self.sink_error: Exception | None = None
        self.heard_at = float("-inf")

    def push(self, piece: bytes) -> None:
        """Pass a piece on. What the sink raises is kept in `sink_error`.

        Raises:
            TimeoutError: the gate is shut; the thread should end.
        """
        with self._lock:
            if not self._open:
                raise TimeoutError("the reader has left")
            self.heard_at = time.monotonic()
            if self.sink_error is None:
                try:
                    self._sink(piece)
                except Exception as error:  # noqa: BLE001 - it is the reader's, not the store's
                    self.sink_error = error

    def shut(self) -> None:
        """Stop all further pieces; waits for one that is just being taken."""
        with self._lock:
            self._open = False
