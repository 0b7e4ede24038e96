"""Chunk lists: a large file as the sequence of its pieces, each with its digest.

A file of at most `CHUNKED_ABOVE_BYTES` travels whole. A larger one travels in pieces whose borders
the client chooses, by content, so that a change inside the file leaves most pieces as they were.
The digest of such a file is that of its chunk list. Every piece is verified on its own, so it can
be used, kept and resumed from as soon as it has arrived.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CHUNKED_ABOVE_BYTES = 4 << 20
"""Both sides must agree: the size alone says whether a digest is that of a chunk list."""
MAX_CHUNK_BYTES = 8 << 20
MAX_LIST_BYTES = 12 << 20
"""Fits into one message; with pieces of 1 MiB on average, files of 340 GiB."""
_RECORD = struct.Struct("<32sI")
RECORD_BYTES = _RECORD.size
"""Of one piece in a chunk list."""


class Chunk(NamedTuple):
    """One piece of a file."""

    sha256: bytes
    size_bytes: int


def is_chunked(size_bytes: int) -> bool:
    """Return whether a file of this size is named by its chunk list."""
    return size_bytes > CHUNKED_ABOVE_BYTES


def encode_chunks(chunks: Iterable[Chunk]) -> bytes:
    """Return a chunk list, whose SHA-256 names the file."""
    return b"".join(_RECORD.pack(*chunk) for chunk in chunks)


def decode_chunks(data: bytes, size_bytes: int) -> list[Chunk]:
    """Return the pieces of a file of `size_bytes`.

    Raises:
        UsageError: it is no chunk list, or not one of a file of this size.
    """
    if len(data) % RECORD_BYTES or len(data) > MAX_LIST_BYTES:
        raise UsageError("the client sent a damaged chunk list")
    chunks = decode_records(data)
    if sum(chunk.size_bytes for chunk in chunks) != size_bytes or not all(
        0 < chunk.size_bytes <= MAX_CHUNK_BYTES for chunk in chunks
    ):
        raise UsageError("the client sent a chunk list that does not fit its file")
    return chunks


def decode_records(data: bytes) -> list[Chunk]:
    """Return the pieces of a part of a chunk list that is known to be right."""
    return [Chunk(*record) for record in _RECORD.iter_unpack(data)]


def offsets(chunks: Sequence[Chunk]) -> list[int]:
    """Return where each piece begins in the file."""
    return list(accumulate((chunk.size_bytes for chunk in chunks[:-1]), initial=0))
