"""Targets with the same build context scan it together.

What is listed may have changed by the time at which a later target asks for it, so only scans that
run at about the same time are shared; a later one finds the digests in the stat index.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, cast

from offload_client.context.source import DirectorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

    from offload_client.context.entries import ContextItem
    from offload_client.context.source import ContentReader, ContextSource, Selection

FRESH_SECONDS = 2.0
"""A scan that ended longer ago is not shared any more."""

_Key = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


class SharedContexts:
    """The directories of several builds, each scanned once."""

    def __init__(self) -> None:
        self._by_root: dict[Path, SharedDirectory] = {}

    @property
    def scans(self) -> int:
        """How often a directory was really scanned."""
        return sum(shared.scans for shared in self._by_root.values())

    def share(self, sources: Mapping[str, ContextSource]) -> dict[str, ContextSource]:
        """Return the same sources, directories among them in their shared form."""
        return {
            name: self._shared(source) if isinstance(source, DirectorySource) else source
            for name, source in sources.items()
        }

    def _shared(self, source: DirectorySource) -> SharedDirectory:
        root = source.root.resolve()
        return self._by_root.setdefault(root, SharedDirectory(source))


class SharedDirectory:
    """A directory that several builds scan; threads can share it."""

    def __init__(self, directory: DirectorySource) -> None:
        """Scan nothing yet."""
        self._directory = directory
        self._lock = threading.Lock()
        # One scan hashes what the next one then finds in the index.
        self._alone = threading.Lock()
        self._recordings: dict[_Key, _Recording] = {}
        self.scans = 0
        """How often it was really scanned."""

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Yield the selected entries; see `ContextSource.scan`."""
        key = tuple(selection.include), tuple(selection.exclude), tuple(selection.follow)
        with self._lock:
            recording = self._recordings.get(key)
            if recording is None or not recording.join():
                self.scans += 1
                recording = _Recording(self._directory, selection, self._alone)
                self._recordings[key] = recording
        try:
            yield from recording.items()
            for text in recording.warnings:
                warn(text)
        finally:
            recording.leave()

    def open(self) -> ContentReader:
        """Return a reader; see `ContextSource.open`."""
        return self._directory.open()


class _Recording:
    """One scan in a thread of its own, which any number of threads follow."""

    def __init__(
        self, directory: DirectorySource, selection: Selection, alone: threading.Lock
    ) -> None:
        self.warnings: list[str] = []
        self._directory = directory
        self._selection = selection
        self._alone = alone
        self._items: list[ContextItem] = []
        self._changed = threading.Condition()
        self._followers = 1
        self._error: BaseException | None = None
        self._ended_at: float | None = None
        self._incomplete = False
        # A daemon thread: hashing a huge file must not hold up the end after Ctrl-C.
        threading.Thread(target=self._run, name="shared-scan", daemon=True).start()

    def join(self) -> bool:
        """Add one follower; False when the scan is too old, failed or was given up."""
        with self._changed:
            stale = self._ended_at is not None and time.monotonic() - self._ended_at > FRESH_SECONDS
            abandoned = self._incomplete or (not self._followers and self._ended_at is None)
            if self._error is not None or stale or abandoned:
                return False
            self._followers += 1
            return True

    def leave(self) -> None:
        """Remove one follower; without any, the scan is given up."""
        with self._changed:
            self._followers -= 1

    def items(self) -> Iterator[ContextItem]:
        """Yield what is found, as it is found.

        Raises:
            ContextError: the directory cannot be read.
        """
        index = 0
        while True:
            with self._changed:
                while index == len(self._items) and self._ended_at is None:
                    self._changed.wait()
                end = len(self._items)
                if index == end:
                    break
            while index < end:
                yield self._items[index]
                index += 1
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with self._alone:
                scan = self._directory.scan(self._selection, warn=self.warnings.append)
                with closing(cast("Generator[ContextItem]", scan)) as found:
                    for item in found:
                        if not self._followers:
                            self._incomplete = True
                            break
                        self._add(item)
        except BaseException as failure:  # noqa: BLE001 - raised again in those who follow
            error = failure
        finally:
            with self._changed:
                self._error = error
                self._ended_at = time.monotonic()
                self._changed.notify_all()

    def _add(self, item: ContextItem) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()
