"""Digests of the content of open files, as listings of trees name it.

A file of at most `CHUNKED_ABOVE_BYTES` has the SHA-256 of its bytes, a larger one that of its
chunk list.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

from offload_core.chunking import Chunker
from offload_core.chunklist import encode_chunks, is_chunked


class ContentDigest(NamedTuple):
    """What one reading of a file found.

    Attributes:
        sha256: of the content, or of the chunk list of a large file.
        size_bytes: that were read, which is not what was expected of a file that changes.
        chunk_list: encoded; None for a file that is not large.
    """

    sha256: bytes
    size_bytes: int
    chunk_list: bytes | None


class ContentDigester:
    """Reads and hashes regular files; for one thread at a time; closed by its owner."""

    def __init__(self) -> None:
        self._chunker = Chunker()

    def close(self) -> None:
        """Free what large files need; harmless when done twice."""
        self._chunker.close()

    def digest(self, fd: int, size_bytes: int) -> ContentDigest:
        """Read a file.

        Args:
            fd: descriptor of a regular file.
            size_bytes: its size as listed, which decides whether it is large.

        Raises:
            OSError: it cannot be read.
        """
        if not is_chunked(size_bytes):
            data = read_whole(fd, size_bytes)
            return ContentDigest(hashlib.sha256(data).digest(), len(data), None)
        chunks, length = self._chunker.cut(fd, size_bytes)
        chunk_list = encode_chunks(chunks)
        return ContentDigest(hashlib.sha256(chunk_list).digest(), length, chunk_list)


def read_whole(fd: int, size_bytes: int) -> bytes:
    """Return the content of a file, and of one that grew at least a byte more than its old size.

    Raises:
        OSError: it cannot be read.
    """
    data = os.pread(fd, size_bytes + 1, 0)
    if len(data) >= size_bytes:
        return data
    return data + read_at(fd, len(data), size_bytes + 1 - len(data))


def read_at(fd: int, offset: int, size_bytes: int) -> bytes:
    """Return so many bytes from a place in a file, fewer only where it ends.

    Raises:
        OSError: it cannot be read.
    """
    data = os.pread(fd, size_bytes, offset)
    while len(data) < size_bytes:
        more = os.pread(fd, size_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
