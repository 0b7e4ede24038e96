"""Decides for each file whether its digest is known from the index or has to be made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from offload_client.context.hashing import FileHasher, HashedFile
from offload_client.context.indexrows import FileTable, IndexedFile, KnownFiles
from offload_client.context.statindex import GRANULARITY_NS
from offload_core.chunklist import CHUNKED_ABOVE_BYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, MutableMapping, Sequence
    from types import TracebackType

    from offload_client.context.statindex import StatIndex

DIRECT_FILES = 256
"""So many files are hashed before the index is opened: as fast as importing sqlite3."""
DIRECT_BYTES = 4 << 20
"""At most so many bytes of them."""

_KEPT_LINKED = 50_000
"""Files with several names that are not read again under another one: some 15 MB."""

_State = tuple[int, ...]


class DigestSource:
    """Gives digests during one scan; saves new ones in the index, which its caller owns.

    Closed by its owner.
    """

    def __init__(
        self, index: StatIndex | None, chunk_lists: MutableMapping[bytes, bytes] | None = None
    ) -> None:
        """Prepare for a scan.

        Args:
            index: digests of former scans; None reads every file.
            chunk_lists: receives those that are made here, by their digest.
        """
        self._index = index
        self._chunk_lists = {} if chunk_lists is None else chunk_lists
        self._hasher = FileHasher()
        self._linked: dict[_State, tuple[bytes, Mapping[str, bytes]]] = {}
        self._direct_files = 0
        self._direct_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save what was hashed; harmless when done twice."""
        self._hasher.close()
        if self._index is not None:
            self._index.save()

    def directory(self, path: str, fd: int) -> DirectoryDigests:
        """Return what gives the digests in one directory.

        Args:
            path: of the directory, "" for the root.
            fd: the same, open as long as the result is used.
        """
        return DirectoryDigests(self, path, fd)

    def index_for(self, statuses: Sequence[os.stat_result]) -> StatIndex | None:
        """Return the index when it is worth opening for these files and those before."""
        if self._index is None or not self._direct():
            return self._index
        self._direct_files += len(statuses)
        self._direct_bytes += sum(status.st_size for status in statuses)
        return None if self._direct() else self._index

    def hash_file(self, fd: int, name: str, path: str, status: os.stat_result) -> HashedFile | None:
        """Return a file's digest; None when it is gone.

        Raises:
            ContextError: it cannot be read.
            ContextChangedError: it keeps changing.
        """
        if status.st_nlink > 1:
            linked = self._linked.get(_state(status))
            if linked is not None:
                return HashedFile(linked[0], status, linked[1], None)
        hashed = self._hasher.hash_file(fd, name, path, status)
        if hashed is None:
            return None
        if hashed.chunk_list is not None:
            self._chunk_lists[hashed.sha256] = hashed.chunk_list
            if self._index is not None:
                self._index.remember_chunk_list(hashed.sha256, hashed.chunk_list)
        if hashed.status.st_nlink > 1 and len(self._linked) < _KEPT_LINKED:
            self._linked[_state(hashed.status)] = hashed.sha256, hashed.xattrs
        return hashed

    def _direct(self) -> bool:
        return self._direct_files <= DIRECT_FILES and self._direct_bytes <= DIRECT_BYTES


def _state(status: os.stat_result) -> _State:
    """Return what only the names of one file that did not change have in common."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


class DirectoryDigests:
    """The files of one directory, asked for in batches in the order of their names."""

    def __init__(self, source: DigestSource, path: str, fd: int) -> None:
        self._source = source
        self._path = path
        self._fd = fd
        self._index: StatIndex | None = None
        self._known = KnownFiles()
        self._fresh = FileTable()
        self._stale: set[str] = set()
        # Taken before the first file is opened, which is the safe side for all of them.
        self._trusted_before = time.time_ns() - GRANULARITY_NS

    def find(
        self, names: list[str], statuses: list[os.stat_result]
    ) -> tuple[list[bytes | None], Mapping[str, Mapping[str, bytes]]]:
        """Return the digests of files, None for one that is gone, and their extended attributes.

        Args:
            names: of regular files, sorted.
            statuses: as listed; replaced in place where a file has changed since.

        Raises:
            ContextError: a file cannot be read.
            ContextChangedError: a file keeps changing.
        """
        if self._index is None:
            self._index = self._source.index_for(statuses)
            if self._index is not None:
                self._known = self._index.directory(self._path)
        digests = self._known.digests(names, statuses)
        if self._index is not None:
            self._index.keep_chunk_lists(
                digest
                for digest, status in zip(digests, statuses, strict=True)
                if status.st_size > CHUNKED_ABOVE_BYTES and digest is not None
            )
        xattrs = dict(self._known.xattrs)
        if None in digests:
            for number, digest in enumerate(digests):
                if digest is None:
                    digests[number] = self._hash(names[number], statuses, number, xattrs)
        return digests, xattrs

    def _hash(
        self,
        name: str,
        statuses: list[os.stat_result],
        number: int,
        xattrs: dict[str, Mapping[str, bytes]],
    ) -> bytes | None:
        path = f"{self._path}/{name}" if self._path else name
        hashed = self._source.hash_file(self._fd, name, path, statuses[number])
        xattrs.pop(name, None)
        if self._known:
            self._stale.add(name)
        if hashed is None:
            return None
        if hashed.xattrs:
            xattrs[name] = hashed.xattrs
        status = statuses[number] = hashed.status
        if max(status.st_mtime_ns, status.st_ctime_ns) < self._trusted_before:
            file = IndexedFile(
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
                hashed.sha256,
                hashed.xattrs or None,
            )
            self._fresh.add(name, file)
        return hashed.sha256

    def finish(self, names: Collection[str]) -> None:
        """Remember what was hashed.

        Args:
            names: all in the directory; what the index knows of others is dropped.
        """
        if self._index is None or not self._fresh:
            return
        if self._known:
            present = frozenset(names) - self._stale
            for name, file in self._known.files():
                if name in present:
                    self._fresh.add(name, file)
        self._index.remember(self._path, self._fresh)
