"""Reading stored blobs: those that have just come from memory, damaged ones asked for again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from offload_builder.node.contextstore import ANY_SIZE
from offload_core.errors import NodeLostError, UsageError

if TYPE_CHECKING:
    from offload_builder.node.wantedblobs import WantedBlobs

SMALL_BYTES = 256 << 10
"""Up to here a file is read at once, from the page cache: shorter than a hand-over to a thread."""
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
    digest, place, size, path = blob
    for _ in range(ATTEMPTS):
        await blobs.arrival(digest, path)
        data = blobs.recent.take(digest)
        if data is not None and size not in (ANY_SIZE, len(data)):
            raise UsageError(f'the client listed "{path[:200]}" with a size that it does not have')
        if data is None:
            data = await _from_disk(blobs, digest, size)
        if data is not None:
            return data
        await blobs.want_again(digest, place, size)
    raise NodeLostError("the node could not keep a file of the build context; build again")


async def _from_disk(blobs: WantedBlobs, digest: bytes, size: int) -> bytes | None:
    verified = blobs.is_verified(digest)
    if 0 < size <= SMALL_BYTES:
        data = blobs.store.read_sync(digest, size, verify=not verified)
    else:
        read = partial(blobs.store.read_sync, digest, size, verify=not verified)
        data = await blobs.store.run_reading(read)
    if data is not None and not verified:
        blobs.note_verified(digest)
    return data
