"""Delivers the bytes of entries that a scan has listed, and never other bytes than listed.

A file can change between scan and reading. The last piece of a file is handed out only after the
digest of the whole has been checked, so that no one ever holds a complete file that is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import TYPE_CHECKING, Self

from offload_client.context.hashing import changed
from offload_client.context.rootdir import RootDirectory
from offload_core.errors import ContextChangedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from offload_client.context.entries import TreeEntry

CHUNK_BYTES = 1 << 20


class BlobReader:
    """Reads many files below one root; for one thread at a time; closed by its owner."""

    def __init__(self, root: Path) -> None:
        """Open the root.

        Raises:
            ContextError: it cannot be opened.
        """
        self._root = RootDirectory(root)

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
        """Close all descriptors."""
        self._root.close()

    def read(self, entry: TreeEntry) -> bytes:
        """Return the whole content of an entry.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        return b"".join(self.chunks(entry, chunk_bytes=entry.size_bytes + 1))

    def read_small(self, entries: Iterable[TreeEntry]) -> list[bytes | ContextChangedError]:
        """Return the contents of several entries; one that changed does not spoil the others."""
        contents: list[bytes | ContextChangedError] = []
        for entry in entries:
            try:
                contents.append(self.read(entry))
            except ContextChangedError as error:
                contents.append(error)
        return contents

    def chunks(self, entry: TreeEntry, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the content of an entry in pieces; nothing for an empty file.

        Args:
            entry: a regular file with a digest.
            chunk_bytes: upper bound of a piece.

        Raises:
            ContextChangedError: the file is not what was listed; the last piece was not yielded.
        """
        if entry.sha256 is None:
            raise ValueError(f"{entry.path} is no regular file")
        try:
            fd = self._root.open_file(entry.path)
        except OSError as error:
            raise _lost(entry, error) from error
        try:
            yield from _verified(fd, entry, entry.sha256, chunk_bytes)
        finally:
            os.close(fd)


def _verified(fd: int, entry: TreeEntry, sha256: bytes, chunk_bytes: int) -> Iterator[bytes]:
    digest = hashlib.sha256()
    left = entry.size_bytes
    while True:
        # One byte more than should be there, to see a file that grew.
        data = _read(fd, entry, min(chunk_bytes, left + 1))
        if len(data) > left:
            raise changed(entry.path, "it grew")
        if not data and left:
            raise changed(entry.path, "it shrank")
        digest.update(data)
        left -= len(data)
        if left == 0:
            break
        yield data
    if data and len(data) == chunk_bytes and _read(fd, entry, 1):
        raise changed(entry.path, "it grew")
    if digest.digest() != sha256:
        raise changed(entry.path, "its content is another")
    if data:
        yield data


def _read(fd: int, entry: TreeEntry, size: int) -> bytes:
    try:
        return os.read(fd, size)
    except OSError as error:
        raise _lost(entry, error) from error


def _lost(entry: TreeEntry, error: OSError) -> ContextChangedError:
    if error.errno == errno.ENOENT:
        return changed(entry.path, "it is gone")
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return changed(entry.path, "a symbolic link took its place")
    return changed(entry.path, f"it cannot be read any more ({error.strerror})")


def read_blob(root: Path, entry: TreeEntry, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the content of one entry in pieces; for many small files use a `BlobReader`.

    Args:
        root: root of the build context.
        entry: a regular file with a digest.
        chunk_bytes: upper bound of a piece.

    Raises:
        ContextError: the root cannot be opened.
        ContextChangedError: the file is not what was listed; the last piece was not yielded.
    """
    with BlobReader(root) as reader:
        yield from reader.chunks(entry, chunk_bytes=chunk_bytes)


def read_small(root: Path, entries: Iterable[TreeEntry]) -> list[bytes | ContextChangedError]:
    """Return the contents of several small files, in order; an error in the place of a changed one.

    Raises:
        ContextError: the root cannot be opened.
    """
    with BlobReader(root) as reader:
        return reader.read_small(entries)
