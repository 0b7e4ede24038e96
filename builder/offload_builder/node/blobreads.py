"""Reading stored blobs: those that have just come from memory, damaged ones asked for again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from offload_builder.node.contextstore import ANY_SIZE
from offload_core.errors import NodeLostError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from offload_builder.node.wantedblobs import WantedBlobs

SMALL_BYTES = 256 << 10
"""Up to here a file is read at once, from the page cache: shorter than a hand-over to a thread."""
PART_BYTES = 1 << 20
"""What a reader has in memory; many read at the same time, and some of them rest half-way."""
ATTEMPTS = 3


class Blob(NamedTuple):
    """A blob that was wanted.

    Attributes:
        sha256: its digest.
        place: in the client's listing.
        size_bytes: or `ANY_SIZE`.
        path: of its file.
    """

    sha256: bytes
    place: int
    size_bytes: int
    path: str


async def read_blob(blobs: WantedBlobs, blob: Blob) -> bytes | memoryview:
    """Return the content of a blob, waiting for it to arrive.

    Content that was on the disk before this build is verified first.

    Raises:
        ContextChangedError: the client cannot deliver it.
        UsageError: it has another size than was listed.
        OffloadError: it will not come for another reason.
    """
    for _ in range(ATTEMPTS):
        data = await _arrived(blobs, blob)
        if data is None:
            data = await _from_disk(blobs, blob.sha256, blob.size_bytes)
        if data is not None:
            return data
        await blobs.want_again(blob.sha256, blob.place, blob.size_bytes)
    raise _not_kept()


def blob_at_hand(blobs: WantedBlobs, digest: bytes, size: int) -> bytes | memoryview | None:
    """Return a small blob that needs no waiting; None for `read_blob` to find out why not.

    Raises:
        UsageError: it has another size than was listed.
        NodeLostError: it cannot be read.
    """
    if not blobs.is_settled(digest):
        return None
    data = blobs.recent.take(digest)
    if data is None:
        data = _small_from_disk(blobs, digest, size)
    return data if data is not None and len(data) == size else None


async def read_parts(blobs: WantedBlobs, blob: Blob) -> AsyncGenerator[bytes | memoryview]:
    """Yield the content of a blob in parts of up to 1 MiB; else as `read_blob`."""
    if blob.size_bytes <= PART_BYTES:
        yield await read_blob(blobs, blob)
        return
    data = await _arrived_or_verified(blobs, blob)
    if data is not None:
        view = memoryview(data)
        for start in range(0, len(view), PART_BYTES):
            yield view[start : start + PART_BYTES]
        return
    for start in range(0, blob.size_bytes, PART_BYTES):
        read = blobs.store.read_part_sync
        size = min(PART_BYTES, blob.size_bytes - start)
        yield await blobs.store.run_reading(read, blob.sha256, start, size)


async def _arrived_or_verified(blobs: WantedBlobs, blob: Blob) -> bytes | memoryview | None:
    """Return a blob that has just come, or None when it is on the disk as it should be."""
    for _ in range(ATTEMPTS):
        data = await _arrived(blobs, blob)
        if data is not None or blobs.is_verified(blob.sha256):
            return data
        # Hashed before and not while it is sent: what BuildKit has got cannot be taken back.
        check = blobs.store.is_whole_sync
        if await blobs.store.run_reading(check, blob.sha256, blob.size_bytes):
            blobs.note_verified(blob.sha256)
            return None
        await blobs.want_again(blob.sha256, blob.place, blob.size_bytes)
    raise _not_kept()


async def _arrived(blobs: WantedBlobs, blob: Blob) -> bytes | memoryview | None:
    """Wait for a blob; return it when it is still in memory."""
    await blobs.arrival(blob.sha256, blob.path)
    data = blobs.recent.take(blob.sha256)
    if data is not None and blob.size_bytes not in (ANY_SIZE, len(data)):
        raise UsageError(f'the client listed "{blob.path[:200]}" with a size that it does not have')
    return data


def _not_kept() -> NodeLostError:
    return NodeLostError("the node could not keep a file of the build context; build again")


async def _from_disk(blobs: WantedBlobs, digest: bytes, size: int) -> bytes | None:
    if 0 < size <= SMALL_BYTES:
        return _small_from_disk(blobs, digest, size)
    verify = not blobs.is_verified(digest)
    read = partial(blobs.store.read_sync, digest, size, verify=verify)
    return _noted(blobs, digest, await blobs.store.run_reading(read))


def _small_from_disk(blobs: WantedBlobs, digest: bytes, size: int) -> bytes | None:
    verify = not blobs.is_verified(digest)
    return _noted(blobs, digest, blobs.store.read_sync(digest, size, verify=verify))


def _noted(blobs: WantedBlobs, digest: bytes, data: bytes | None) -> bytes | None:
    if data is not None:
        blobs.note_verified(digest)
    return data
