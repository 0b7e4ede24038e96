"""Content of one build's local sources: on this node, in the shared store, or at the client.

BuildKit asks for files of a listing. What the project has is read from its store; the rest is
fetched from the shared store or asked of the client, and handed on as it arrives.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from offload_builder.node.blobplaces import place_of
from offload_builder.node.blobreads import (
    PART_BYTES,
    SMALL_BYTES,
    Blob,
    blob_at_hand,
    read_blob,
    read_parts,
)
from offload_builder.node.contextstore import ANY_SIZE
from offload_builder.node.largefiles import LargeFiles
from offload_builder.node.wantedblobs import WantedBlobs
from offload_core.chunklist import is_chunked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from offload_builder.node.arrivals import Arrivals
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.contextshare import SharedContext
    from offload_builder.node.contextstore import ContextStore
    from offload_core.errors import OffloadError
    from offload_proto.v1.builds_service_pb2 import BuildStats
    from offload_proto.v1.node_service_pb2 import BlobFailure


class WantedFile(NamedTuple):
    """A file of a listing.

    Attributes:
        request_id: of the ContextRequest.
        entry: its number in the listing.
        path: for errors.
        size_bytes: of the file, more than 0.
        sha256: of the file, or of its chunk list when it is large.
    """

    request_id: int
    entry: int
    path: str
    size_bytes: int
    sha256: bytes


class BuildContent:
    """What one build reads of its local sources; close it at the end in any case.

    Attributes:
        blobs: the blobs that it needs; uploads bring them.
    """

    def __init__(
        self,
        store: ContextStore,
        arrivals: Arrivals,
        link: ClientLink,
        shared: SharedContext | None,
        stats: BuildStats,
    ) -> None:
        self.blobs = WantedBlobs(store, arrivals, link, shared, stats)
        self._large = LargeFiles(self.blobs)

    async def request(self, files: Sequence[WantedFile]) -> None:
        """Make sure that files are here or on their way; they may be read afterwards.

        The files are leased until `close`. Does not wait for what is on its way.
        """
        places: dict[bytes, int] = {}
        sizes: dict[bytes, int] = {}
        for request_id, entry, _, size, digest in files:
            if digest not in places:
                places[digest] = place_of(request_id, entry)
                sizes[digest] = ANY_SIZE if is_chunked(size) else size
        await self.blobs.want(places, sizes)
        for file in files:
            if is_chunked(file.size_bytes):
                self._large.add(file)

    def at_hand(self, file: WantedFile) -> bytes | memoryview | None:
        """Return the content of a small file that is here already; None when `read` must wait.

        Raises:
            UsageError: it has another size than was listed.
            NodeLostError: it cannot be read.
        """
        if file.size_bytes > SMALL_BYTES:
            return None
        return blob_at_hand(self.blobs, file.sha256, file.size_bytes)

    async def read(self, file: WantedFile) -> AsyncGenerator[bytes | memoryview]:
        """Yield the content of a file that was requested, as it arrives, in parts of up to 1 MiB.

        Raises:
            ContextChangedError: the client cannot deliver what it has listed.
            UsageError: what it has listed does not fit together.
            OffloadError: the client is gone, or the node cannot store or read it.
        """
        if is_chunked(file.size_bytes):
            async with aclosing(self._large.pieces(file)) as pieces:
                async for piece in pieces:
                    async with aclosing(read_parts(self.blobs, piece)) as parts:
                        async for part in parts:
                            yield part
            return
        place = place_of(file.request_id, file.entry)
        blob = Blob(file.sha256, place, file.size_bytes, file.path)
        if file.size_bytes <= PART_BYTES:
            yield await read_blob(self.blobs, blob)
            return
        async with aclosing(read_parts(self.blobs, blob)) as parts:
            async for part in parts:
                yield part

    # What the control stream tells.

    def blob_failure(self, message: BlobFailure) -> None:
        """Hear that the client cannot deliver a file."""
        self.blobs.blob_failure(message)

    def lose(self, error: OffloadError) -> None:
        """Hear that the client can no longer be asked; what is stored can still be read."""
        self.blobs.fail(error)

    async def close(self) -> None:
        """Give claims and leases back; safe to call again."""
        await self.blobs.close()
        await self._large.close()
