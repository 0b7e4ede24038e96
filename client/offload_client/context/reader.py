"""Delivers the bytes of files that a scan has listed, or says which file changed since.

Nothing is hashed here a second time: size and modification time before and after reading are
those that were listed, and the other side verifies every blob against its digest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Self

from offload_client.context.contextroot import open_root
from offload_client.context.hashing import changed
from offload_client.context.statindex import StatIndex
from offload_core.chunking import Chunker
from offload_core.chunklist import encode_chunks
from offload_core.filedigest import read_at, read_whole

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from pathlib import Path
    from types import TracebackType

    from offload_client.context.source import ListedContent
    from offload_core.errors import ContextChangedError


class DirectoryReader:
    """Reads files below one root; for one thread at a time; closed by its owner."""

    def __init__(
        self,
        root: Path,
        *,
        chunk_lists: MutableMapping[bytes, bytes] | None = None,
        index_path: Path | None = None,
    ) -> None:
        """Open the root.

        Args:
            root: root of the build context.
            chunk_lists: those that are known, by digest; those made here are added.
            index_path: stat index that may know others; None for none.

        Raises:
            ContextError: the root cannot be opened.
        """
        self._root = open_root(root)
        self._chunk_lists = {} if chunk_lists is None else chunk_lists
        self._index = StatIndex(index_path, root) if index_path is not None else None
        self._large_path = ""
        self._large_fd = -1

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
        """Close all descriptors; harmless when done twice."""
        self._forget_large()
        self._root.close()
        if self._index is not None:
            self._index.close()

    def read(self, file: ListedContent) -> bytes:
        """Return the content of a file that is not large.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        fd = self._open(file)
        try:
            _check(fd, file)
            data = read_whole(fd, file.size_bytes)
            _check(fd, file)
        except OSError as error:
            raise _lost(file, error) from error
        finally:
            os.close(fd)
        if len(data) != file.size_bytes:
            raise _resized(file, len(data))
        return data

    def read_chunk(self, file: ListedContent, offset: int, size: int) -> bytes:
        """Return a piece of a file, `size` bytes from `offset` on.

        The file stays open for the next piece.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        fd = self._open_large(file)
        try:
            data = read_at(fd, offset, size)
            _check(fd, file)
        except OSError as error:
            raise _lost(file, error) from error
        if len(data) != size:
            raise _resized(file, offset + len(data))
        return data

    def chunk_list(self, file: ListedContent) -> bytes:
        """Return the encoded chunk list of a large file, whose SHA-256 is `file.sha256`.

        It is the one that the scan made or that the index has; else the file is read again.

        Raises:
            ContextChangedError: the file is not what was listed.
        """
        data = self._chunk_lists.get(file.sha256)
        if data is None and self._index is not None:
            data = self._index.chunk_list(file.sha256)
        if data is None:
            data = self._cut(file)
        self._chunk_lists[file.sha256] = data
        return data

    def _cut(self, file: ListedContent) -> bytes:
        fd = self._open_large(file)
        try:
            with Chunker() as chunker:
                chunks, size = chunker.cut(fd, file.size_bytes)
            _check(fd, file)
        except OSError as error:
            raise _lost(file, error) from error
        if size != file.size_bytes:
            raise _resized(file, size)
        data = encode_chunks(chunks)
        if hashlib.sha256(data).digest() != file.sha256:
            raise changed(file.path, "its content is another")
        return data

    def _open(self, file: ListedContent) -> int:
        try:
            return self._root.open_file(file.path)
        except OSError as error:
            raise _lost(file, error) from error

    def _open_large(self, file: ListedContent) -> int:
        if self._large_fd < 0 or self._large_path != file.path:
            self._forget_large()
            self._large_fd = self._open(file)
            self._large_path = file.path
            try:
                _check(self._large_fd, file)
            except BaseException:
                self._forget_large()
                raise
        return self._large_fd

    def _forget_large(self) -> None:
        if self._large_fd >= 0:
            os.close(self._large_fd)
            self._large_fd = -1


def _check(fd: int, file: ListedContent) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise changed(file.path, "it is no regular file any more")
    if status.st_size != file.size_bytes:
        raise _resized(file, status.st_size)
    if status.st_mtime_ns != file.modified_at_ns:
        raise changed(file.path, "it was written")


def _resized(file: ListedContent, size_bytes: int) -> ContextChangedError:
    return changed(file.path, "it grew" if size_bytes > file.size_bytes else "it shrank")


def _lost(file: ListedContent, error: OSError) -> ContextChangedError:
    if error.errno == errno.ENOENT:
        return changed(file.path, "it is gone")
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return changed(file.path, "a symbolic link took its place")
    return changed(file.path, f"it cannot be read any more ({error.strerror})")
