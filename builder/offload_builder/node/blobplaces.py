"""Where a blob is in a listing, and how the client is asked for it.

A place is one number and not an object of several fields: there is one for each blob on its way,
and these can be some hundred thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_proto.v1.node_service_pb2 import NeedBlobs, NeedChunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NUMBERS_PER_MESSAGE = 10_000
_BITS = 32
_MASK = (1 << _BITS) - 1
_WHOLE = -1


def place_of(request_id: int, entry: int, chunk: int = _WHOLE) -> int:
    """Return the place of a file or chunk list, or of a piece of a large file."""
    return (request_id << _BITS | entry) << _BITS | (chunk + 1)


def is_piece(place: int) -> bool:
    """Return whether a place is that of a piece of a large file."""
    return place & _MASK != 0


def is_of_entry(place: int, request_id: int, entry: int) -> bool:
    """Return whether a place belongs to an entry."""
    return place >> _BITS == request_id << _BITS | entry


def requests(places: Iterable[int]) -> Iterator[NeedBlobs]:
    """Yield the messages that ask for blobs, each with a bounded count of numbers."""
    message = NeedBlobs()
    chunks: NeedChunks | None = None
    count = 0
    for place in places:
        request_id = place >> 2 * _BITS
        if count and (request_id != message.request_id or count >= NUMBERS_PER_MESSAGE):
            yield message
            message, chunks, count = NeedBlobs(), None, 0
        message.request_id = request_id
        entry, chunk = place >> _BITS & _MASK, (place & _MASK) - 1
        if chunk == _WHOLE:
            message.entries.append(entry)
        else:
            if chunks is None or chunks.entry != entry:
                chunks = message.chunks.add(entry=entry)
            chunks.chunks.append(chunk)
        count += 1
    if count:
        yield message
