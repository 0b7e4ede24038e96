"""What is known of one side's tree, and how that is kept right.

Nothing here is a coroutine: it runs in one thread, for it reads directories and files.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol

from offload_core.chunklist import CHUNKED_ABOVE_BYTES, MAX_LIST_BYTES
from offload_core.errors import QuotaExceededError
from offload_core.filedigest import ContentDigester
from offload_core.treesync.entries import (
    ABSENT,
    OTHER,
    Entry,
    Listing,
    directory,
    file,
    link,
    parent_of,
)
from offload_core.treesync.rules import TEMPORARY
from offload_core.treesync.tree import Stamp, Tree, stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_core.treesync.inotify import Inotify
    from offload_core.treesync.rules import Rules

_CLOCK_NS = 20_000_000
"""Two writes within one tick of the kernel's clock (10 ms at the slowest) look the same."""
_ATTEMPTS = 2
_CHUNK_LISTS_BYTES = 16 << 20
_QUIET_SECONDS_PER_BYTE = 2.0 / (1 << 30)
"""A file that is being written is read once it has rested, the longer the larger it is."""
_MAX_QUIET_SECONDS = 5.0


class KnownDigests(Protocol):
    """Digests of former runs."""

    def find(
        self, directory_path: str, names: Sequence[str], statuses: Sequence[os.stat_result]
    ) -> Sequence[bytes | None]:
        """Return the digests of files in a directory, names sorted; None where not known."""

    def remember(
        self, directory_path: str, files: Sequence[tuple[str, os.stat_result, bytes]]
    ) -> None:
        """Keep all digests of a directory for later runs."""

    def chunk_list(self, sha256: bytes) -> bytes | None:
        """Return a chunk list by its digest."""

    def remember_chunk_list(self, sha256: bytes, data: bytes) -> None:
        """Keep a chunk list."""

    def save(self) -> None:
        """Write what is to be kept."""


class Limits(NamedTuple):
    """How large a tree may be.

    Attributes:
        files: entries of any kind.
        size_bytes: of all files.
    """

    files: int
    size_bytes: int


class _Known(NamedTuple):
    stamp: Stamp
    read_at_ns: int


class Replica:
    """One side's tree, as far as it was looked at.

    Attributes:
        tree: the directory.
        entries: what is in it, without what is ignored.
        changed: paths whose entries have changed; whoever uses them takes them out.
        busy: files that could not be read because somebody writes them; to be looked at again.
        kept: paths where content was kept that somebody wrote while it was replaced.
    """

    def __init__(
        self,
        tree: Tree,
        rules: Rules,
        limits: Limits,
        *,
        watcher: Inotify | None = None,
        known: KnownDigests | None = None,
    ) -> None:
        self.tree = tree
        self.entries: Listing = {}
        self.changed: set[str] = set()
        self.busy: set[str] = set()
        self.kept: list[str] = []
        self._rules = rules
        self._limits = limits
        self._watcher = watcher
        self._digests = known
        self._digester = ContentDigester()
        self._stamps: dict[str, _Known] = {}
        self._names: dict[str, set[str]] = {"": set()}
        self._chunk_lists: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0

    def close(self) -> None:
        """Close the tree; harmless when done twice."""
        self._digester.close()
        self.tree.close()

    @property
    def watched(self) -> bool:
        """Whether everything that happens is noticed."""
        return self._watcher is not None and self._watcher.complete

    def entry(self, path: str) -> Entry:
        """Return what is known of a path."""
        return self.entries.get(path, ABSENT)

    def allowed(self, path: str, *, is_directory: bool) -> bool:
        """Return whether a path is synchronised."""
        return self._rules.wanted(path, is_directory=is_directory)

    def stamp(self, path: str) -> Stamp | None:
        """Return the stamp of the last look at a file or link."""
        known = self._stamps.get(path)
        return known.stamp if known is not None else None

    # Looking.

    def scan(self) -> None:
        """Look at everything.

        Raises:
            NotFoundError: the directory is gone.
            QuotaExceededError: it holds more than it may.
        """
        self.tree.check()
        self._read_directories([""], deep=True)
        if self._digests is not None:
            self._digests.save()

    def refresh(self, paths: Iterable[str], *, force: bool = False) -> None:
        """Look at some paths, and at what is below those that are new.

        Args:
            paths: of the tree.
            force: read also files that are being written.

        Raises:
            NotFoundError: the directory is gone.
            QuotaExceededError: it holds more than it may.
        """
        self.tree.check()
        for path in sorted(paths):
            self.look(path, force=force)
        # What an event tells may have been moved: the next path is looked up from the root.
        self.tree.check()

    def look(self, path: str, *, force: bool = False) -> Entry:
        """Look at one path, or at its parent where that is not known; return what is there."""
        while (parent := parent_of(path)) and not self.entry(parent).is_directory:
            path = parent
        if path.rpartition("/")[2].startswith(TEMPORARY):
            return ABSENT
        if not path:
            self._read_directories([""], deep=False)
            return ABSENT
        new = self._settle(path, self._status(path), force=force)
        if new:
            self._read_directories([path], deep=True)
        return self.entry(path)

    def note_written(self, path: str, entry: Entry, status: os.stat_result) -> None:
        """Take over what was just written, whose digest is known."""
        self._put(path, entry, stamp_of(status))

    def _status(self, path: str) -> os.stat_result | None:
        try:
            return self.tree.status(path)
        except OSError:
            return None

    def _settle(
        self,
        path: str,
        status: os.stat_result | None,
        *,
        digest: bytes | None = None,
        force: bool = True,
    ) -> bool:
        """Take over one path; return whether it is a directory that was not one before."""
        if status is None:
            self._forget(path)
            return False
        kind = stat.S_IFMT(status.st_mode)
        if not self._rules.wanted(path, is_directory=kind == stat.S_IFDIR):
            self._forget(path)
            return False
        if kind == stat.S_IFDIR:
            stamp = stamp_of(status)
            known = self._stamps.get(path)
            if known is not None and known.stamp[:2] != stamp[:2]:
                # Another directory has come to its place.
                self._forget(path)
            new = not self.entry(path).is_directory
            self._put(path, directory(status.st_mode), stamp)
            return new
        if kind == stat.S_IFREG:
            self._settle_file(path, status, digest, force=force)
        elif kind == stat.S_IFLNK:
            try:
                self._put(path, link(self.tree.read_link(path)), stamp_of(status))
            except OSError:
                self._forget(path)
        else:
            self._put(path, OTHER, None)
        return False

    def _settle_file(
        self, path: str, status: os.stat_result, digest: bytes | None, *, force: bool
    ) -> None:
        stamp = stamp_of(status)
        entry = self.entry(path)
        known = self._stamps.get(path)
        if digest is not None:
            self._put(path, file(status, digest), stamp)
            return
        if (
            known is not None
            and entry.is_file
            and known.stamp == stamp
            and known.read_at_ns > stamp.changed_at_ns + _CLOCK_NS
        ):
            return
        if not force and not _rested(status):
            self.busy.add(path)
            return
        self._read_file(path, status)

    def _read_file(self, path: str, status: os.stat_result) -> None:
        try:
            fd = self.tree.open_file(path)
        except PermissionError:
            self._put(path, OTHER, None)
            return
        except OSError:
            self.busy.add(path)
            return
        try:
            for _ in range(_ATTEMPTS):
                began = time.time_ns()
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    break
                found = self._digester.digest(fd, status.st_size)
                after = os.fstat(fd)
                if found.size_bytes == status.st_size and stamp_of(after) == stamp_of(status):
                    if found.chunk_list is not None:
                        if len(found.chunk_list) > MAX_LIST_BYTES:
                            self._put(path, OTHER, None)
                            return
                        self.keep_chunk_list(found.sha256, found.chunk_list)
                    self._put(path, file(status, found.sha256), stamp_of(status), began)
                    return
        except OSError:
            pass
        finally:
            os.close(fd)
        self.busy.add(path)

    def _read_directories(self, paths: list[str], *, deep: bool) -> None:
        while paths:
            path = paths.pop()
            if self._watcher is not None:
                self._watcher.watch(path, self.tree.absolute(path))
            try:
                found = self.tree.entries(path)
            except PermissionError:
                # Its entries are not known. What was known of them is no reason to delete them.
                continue
            except OSError:
                if path:
                    self._settle(path, self._status(path))
                    continue
                raise
            prefix = f"{path}/" if path else ""
            for name in self._names.get(path, set()).difference(name for name, _ in found):
                self._forget(prefix + name)
            known = self._find_digests(path, found) if deep else {}
            hashed = False
            for name, status in found:
                child = prefix + name
                if name.startswith(TEMPORARY):
                    self.tree.discard_old(child, status)
                    continue
                if not deep and self.entry(child) is not ABSENT:
                    continue
                digest = known.get(name)
                hashed = hashed or (digest is None and child not in self._stamps)
                new = self._settle(child, status, digest=digest)
                if new or (deep and self.entry(child).is_directory):
                    paths.append(child)
            if hashed and deep and self._digests is not None:
                self._remember_digests(path, found)

    def _find_digests(
        self, path: str, found: Sequence[tuple[str, os.stat_result]]
    ) -> dict[str, bytes]:
        """Return what former runs know of files that this one has not looked at."""
        if self._digests is None:
            return {}
        prefix = f"{path}/" if path else ""
        files = sorted(
            (name, status)
            for name, status in found
            if stat.S_ISREG(status.st_mode) and prefix + name not in self._stamps
        )
        if not files:
            return {}
        names = [name for name, _ in files]
        digests = self._digests.find(path, names, [status for _, status in files])
        return {
            name: digest for name, digest in zip(names, digests, strict=True) if digest is not None
        }

    def _remember_digests(self, path: str, found: Sequence[tuple[str, os.stat_result]]) -> None:
        assert self._digests is not None  # noqa: S101 - its caller has looked
        prefix = f"{path}/" if path else ""
        kept: list[tuple[str, os.stat_result, bytes]] = []
        for name, status in sorted(found):
            entry = self.entry(prefix + name)
            known = self._stamps.get(prefix + name)
            if entry.is_file and known is not None and known.stamp == stamp_of(status):
                kept.append((name, status, entry.sha256))
        self._digests.remember(path, kept)

    # Knowing.

    def _put(
        self, path: str, entry: Entry, stamp: Stamp | None, read_at_ns: int | None = None
    ) -> None:
        former = self.entries.get(path)
        if former is not None and former.is_directory and not entry.is_directory:
            self._forget(path)
            former = None
        if stamp is None:
            self._stamps.pop(path, None)
        else:
            self._stamps[path] = _Known(stamp, read_at_ns or time.time_ns())
        if entry.is_directory:
            self._names.setdefault(path, set())
        if former == entry:
            return
        self.entries[path] = entry
        parent, _, name = path.rpartition("/")
        self._names.setdefault(parent, set()).add(name)
        self.changed.add(path)
        self._bytes += entry.size_bytes - (former.size_bytes if former is not None else 0)
        self._check_limits()

    def check_room(self, more_bytes: int) -> None:
        """Look whether a file may come.

        Raises:
            QuotaExceededError: the tree would hold more than it may.
        """
        self._check_limits(more_bytes)

    def _check_limits(self, more_bytes: int = 0) -> None:
        if len(self.entries) > self._limits.files:
            raise QuotaExceededError(
                f"the directory {self.tree.path} has more than {self._limits.files} files",
                hint="list what containers do not need in its .offloadignore, or raise "
                "session_sync_files in config.toml",
            )
        if self._bytes + more_bytes > self._limits.size_bytes:
            raise QuotaExceededError(
                f"the files of {self.tree.path} have more than {self._limits.size_bytes >> 20} MiB",
                hint="list what containers do not need in its .offloadignore, or raise "
                "session_sync_bytes in config.toml",
            )

    def _forget(self, path: str) -> None:
        if path not in self.entries:
            return
        todo = [path]
        while todo:
            gone = todo.pop()
            entry = self.entries.pop(gone, None)
            self._stamps.pop(gone, None)
            if entry is None:
                continue
            self.changed.add(gone)
            self._bytes -= entry.size_bytes
            if entry.is_directory:
                if self._watcher is not None:
                    self._watcher.forget(gone)
                todo += [f"{gone}/{name}" for name in self._names.pop(gone, ())]
        parent, _, name = path.rpartition("/")
        with contextlib.suppress(KeyError):
            self._names[parent].discard(name)

    # Chunk lists.

    def keep_chunk_list(self, sha256: bytes, data: bytes) -> None:
        """Remember a chunk list for a while."""
        if self._digests is not None:
            self._digests.remember_chunk_list(sha256, data)
        self._chunk_lists[sha256] = data
        self._chunk_lists.move_to_end(sha256)
        total = sum(map(len, self._chunk_lists.values()))
        while total > _CHUNK_LISTS_BYTES and len(self._chunk_lists) > 1:
            total -= len(self._chunk_lists.popitem(last=False)[1])

    def known_chunk_list(self, sha256: bytes) -> bytes | None:
        """Return a chunk list that is remembered."""
        data = self._chunk_lists.get(sha256)
        if data is None and self._digests is not None:
            data = self._digests.chunk_list(sha256)
        return data

    def chunk_list(self, path: str, sha256: bytes) -> bytes | None:
        """Return the chunk list of a large file; reads the file when it is not remembered."""
        data = self.known_chunk_list(sha256)
        if data is not None:
            return data
        status = self._status(path)
        if status is not None and status.st_size > CHUNKED_ABOVE_BYTES:
            self._stamps.pop(path, None)
            self._settle(path, status)
        return self._chunk_lists.get(sha256)


def _rested(status: os.stat_result) -> bool:
    """Return whether a file was not written for a time that fits its size."""
    if status.st_size <= CHUNKED_ABOVE_BYTES:
        return True
    quiet = min(status.st_size * _QUIET_SECONDS_PER_BYTE, _MAX_QUIET_SECONDS)
    return abs(time.time() - status.st_mtime) > quiet
