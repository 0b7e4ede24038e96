"""Decides for each file whether its digest is known from the index or has to be made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from offload_client.context.hashing import FileHasher, HashedFile
from offload_client.context.statindex import IndexedFile

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from offload_client.context.statindex import StatIndex

DIRECT_FILES = 256
"""So many files are hashed before the index is opened: as fast as importing sqlite3."""
DIRECT_BYTES = 4 << 20
"""At most so many bytes of them."""


class ListedFile(NamedTuple):
    """A regular file in a directory, with its status from the listing."""

    name: str
    status: os.stat_result


class DigestSource:
    """Gives digests during one scan; saves new ones in the index, which its caller owns."""

    def __init__(self, index: StatIndex | None) -> None:
        self._index = index
        self._hasher = FileHasher()
        self._linked: dict[tuple[int, int], IndexedFile] = {}
        self._direct_files = 0
        self._direct_bytes = 0

    def of(
        self, directory: str, directory_fd: int, files: list[ListedFile], names: set[str]
    ) -> Iterator[tuple[os.stat_result, IndexedFile] | None]:
        """Yield status and digest of each file, in order; None for one that is gone.

        Args:
            directory: path of the directory that holds the files.
            directory_fd: the same, open.
            files: the files that are wanted.
            names: all names in the directory; what the index knows of others is dropped.

        Raises:
            ContextError: a file cannot be read.
            ContextChangedError: a file keeps changing.
        """
        index = self._index_for(files)
        known = index.directory(directory) if index is not None else {}
        fresh: dict[str, IndexedFile] = {}
        # Taken before the first file is opened, which is the safe side for all of them.
        now = time.time_ns()
        for name, status in files:
            file = known.get(name)
            if file is not None and file.describes(status):
                yield status, file
                continue
            linked = self._linked.get((status.st_dev, status.st_ino))
            if linked is not None and linked.describes(status):
                fresh[name] = linked
                yield status, linked
                continue
            path = f"{directory}/{name}" if directory else name
            hashed = self._hasher.hash_file(directory_fd, name, path, status)
            if hashed is None:
                yield None
                continue
            file = fresh[name] = _indexed(hashed, now)
            if hashed.status.st_nlink > 1:
                self._linked[hashed.status.st_dev, hashed.status.st_ino] = file
            yield hashed.status, file
        if index is not None and fresh:
            kept = {name: file for name, file in known.items() if name in names}
            index.remember(directory, kept | fresh)

    def _index_for(self, files: list[ListedFile]) -> StatIndex | None:
        if self._index is None or not self._direct():
            return self._index
        self._direct_files += len(files)
        self._direct_bytes += sum(file.status.st_size for file in files)
        return None if self._direct() else self._index

    def _direct(self) -> bool:
        return self._direct_files <= DIRECT_FILES and self._direct_bytes <= DIRECT_BYTES


def _indexed(hashed: HashedFile, recorded_at_ns: int) -> IndexedFile:
    status = hashed.status
    return IndexedFile(
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        recorded_at_ns,
        hashed.sha256,
        hashed.xattrs or None,
    )
