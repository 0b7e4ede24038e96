"""Content that clients send: unpacked, verified, stored, and announced to those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING

import zstandard

from offload_builder.node.contextstore import MAX_BLOB_BYTES
from offload_core.errors import InternalError, OffloadError, UsageError
from offload_core.listing import SHA256_BYTES
from offload_proto.v1.node_service_pb2 import UploadResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from offload_builder.node.content import BuildContent
    from offload_proto.v1.node_service_pb2 import BlobBatch, UploadRequest

DISCARD_SECONDS = 5.0


class Upload:
    """One upload stream of one build.

    The next message is read when the one before is stored: a slow disk holds the client back, and
    a stream has no more in memory than one message here and what gRPC reads ahead.
    """

    def __init__(self, content: BuildContent) -> None:
        self._blobs = content.blobs
        self._store = content.blobs.store
        self._unpacker = zstandard.ZstdDecompressor()

    async def run(self, requests: AsyncIterator[UploadRequest]) -> AsyncGenerator[UploadResponse]:
        """Store what arrives; yields an acknowledgement per message.

        A fault of storing ends what waits for the content as well, so the build fails with the
        cause and not with a time-out.
        """
        try:
            async for request in requests:
                self._blobs.heard()
                yield await self._take(request.batch)
        except OffloadError as error:
            await self._refuse(error, requests)
            raise

    async def _refuse(self, error: OffloadError, requests: AsyncIterator[UploadRequest]) -> None:
        """Fail the build, and read on for a while without storing anything.

        The result of the build says why. If this call ended at once, a client that is writing
        would see a broken stream first, and no reason.
        """
        self._blobs.fail(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                async for _ in requests:
                    pass

    async def _take(self, batch: BlobBatch) -> UploadResponse:
        if self._blobs.closed:
            return UploadResponse()
        digests, sizes, data = list(batch.sha256), list(batch.sizes), batch.data
        if (
            len(digests) != len(sizes)
            or min(sizes, default=0) < 0
            or not all(len(digest) == SHA256_BYTES for digest in digests)
        ):
            raise UsageError("the client sent a malformed batch of files")
        total = sum(sizes)
        if total > MAX_BLOB_BYTES or (not batch.zstd and total != len(data)):
            raise UsageError("the client sent a batch whose sizes do not add up")
        if not all(map(self._blobs.asked, digests)):
            raise UsageError("the client sent a file that was not asked for")
        self._blobs.stats.context_wire_bytes += len(data)
        try:
            blobs, refused = await self._store.run(
                self._store_sync, digests, sizes, data, batch.zstd, total
            )
        except OffloadError:
            raise
        except Exception as error:
            raise InternalError("the node could not take the build context") from error
        stored_bytes = sum(len(content) for _, content in blobs)
        self._blobs.stored(blobs, size=stored_bytes)
        for digest in refused:
            self._blobs.refused(digest)
        return UploadResponse(stored_blobs=len(blobs), stored_bytes=stored_bytes)

    def _store_sync(
        self, digests: Sequence[bytes], sizes: Sequence[int], data: bytes, zstd: bool, total: int
    ) -> tuple[list[tuple[bytes, memoryview]], list[bytes]]:
        """Return the blobs that were verified and stored, and digests of those that are wrong."""
        view = memoryview(self._unpack(data, total) if zstd else data)
        blobs, refused = [], []
        offset = 0
        for digest, size in zip(digests, sizes, strict=True):
            content = view[offset : offset + size]
            offset += size
            if hashlib.sha256(content).digest() == digest:
                blobs.append((digest, content))
            else:
                refused.append(digest)
        self._store.put_many_sync(blobs)
        return blobs, refused

    def _unpack(self, data: bytes, total: int) -> bytes:
        try:
            # Before it is unpacked: a small message may claim to become very large.
            if zstandard.frame_content_size(data) != total:
                raise UsageError("the client sent a compressed batch whose sizes do not add up")
            return self._unpacker.decompress(data, max_output_size=total, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise UsageError("the client sent damaged compressed data") from error
