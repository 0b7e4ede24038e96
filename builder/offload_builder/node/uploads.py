"""Content that clients send: unpacked, verified, stored, and announced to those who wait."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import zstandard

from offload_builder.node.faults import storage_error
from offload_core.errors import OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import UploadResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.contextstore import ContextStore, PartialBlob
    from offload_proto.v1.builds_service_pb2 import BuildStats
    from offload_proto.v1.node_service_pb2 import BlobBatch, BlobChunk, UploadRequest

MAX_UNPACKED_BYTES = 64 << 20
"""Largest content of one message; ours are of about 1 MiB. Bounds what a zip bomb can do."""

DISCARD_SECONDS = 5.0


class Upload:
    """One upload stream of one build."""

    def __init__(self, store: ContextStore, link: ClientLink, stats: BuildStats) -> None:
        self._store = store
        self._link = link
        self._stats = stats
        self._partial: PartialBlob | None = None
        self._partial_digest = b""
        self._received = 0
        self._unpacker = zstandard.ZstdDecompressor()

    async def run(self, requests: AsyncIterator[UploadRequest]) -> AsyncGenerator[UploadResponse]:
        """Store what arrives; yields an acknowledgement per message.

        A fault of storing ends what waits for the content as well, so the build fails with the
        cause and not with a time-out.
        """
        try:
            async for request in requests:
                self._link.heard()
                if request.WhichOneof("message") == "batch":
                    yield await self._take_batch(request.batch)
                else:
                    yield await self._take_chunk(request.chunk)
        except OffloadError as error:
            await self._refuse(error, requests)
            raise
        except OSError as error:
            failed = storage_error("store the build context", error)
            await self._refuse(failed, requests)
            raise failed from error
        finally:
            self._drop_partial()

    async def _refuse(self, error: OffloadError, requests: AsyncIterator[UploadRequest]) -> None:
        """Fail the build, and read on for a while without storing anything.

        The result of the build says why. If this call ended at once, a client that is writing
        would see a broken stream first, and no reason.
        """
        self._link.fail_blobs(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                async for _ in requests:
                    pass

    async def _take_batch(self, batch: BlobBatch) -> UploadResponse:
        if len(batch.sha256) != len(batch.sizes) or min(batch.sizes, default=0) < 0:
            raise UsageError("the client sent a malformed batch of files")
        total = sum(batch.sizes)
        data = await self._unpack(batch.data, zstd=batch.zstd)
        if total != len(data):
            raise UsageError("the client sent a batch whose sizes do not add up")
        view = memoryview(data)
        blobs: list[tuple[bytes, memoryview]] = []
        offset = 0
        for digest, size in zip(batch.sha256, batch.sizes, strict=True):
            if self._link.wanted(digest):
                blobs.append((digest, view[offset : offset + size]))
            offset += size
        await self._store.run(self._store.store_sync, blobs)
        self._stats.context_sent_bytes += total
        self._link.blobs_arrived([digest for digest, _ in blobs])
        return UploadResponse(stored_blobs=len(blobs), stored_bytes=total)

    async def _take_chunk(self, chunk: BlobChunk) -> UploadResponse:
        data = await self._unpack(chunk.data, zstd=chunk.zstd)
        if chunk.offset_bytes == 0:
            self._drop_partial()
            if not self._link.wanted(chunk.sha256):
                raise UsageError("the client sent a file that was not asked for")
            if chunk.size_bytes != self._link.size(chunk.sha256):
                raise UsageError("the client sent a file of another size than it had listed")
            self._partial = self._store.begin_sync(chunk.sha256)
            self._partial_digest = chunk.sha256
            self._received = 0
        if (
            self._partial is None
            or chunk.sha256 != self._partial_digest
            or chunk.offset_bytes != self._received
            or self._received + len(data) > self._link.size(chunk.sha256)
        ):
            raise UsageError("the client sent the pieces of a file out of order")
        await self._store.run(self._partial.write, data)
        self._received += len(data)
        self._stats.context_sent_bytes += len(data)
        if self._received < self._link.size(chunk.sha256):
            return UploadResponse()
        await self._store.run(self._partial.commit)
        self._drop_partial()
        self._link.blobs_arrived([chunk.sha256])
        return UploadResponse(stored_blobs=1, stored_bytes=self._received)

    async def _unpack(self, data: bytes, *, zstd: bool) -> bytes:
        if not zstd:
            return data
        return await self._store.run(self._unpack_sync, data)

    def _unpack_sync(self, data: bytes) -> bytes:
        try:
            size = zstandard.frame_content_size(data)
            if not 0 <= size <= MAX_UNPACKED_BYTES:
                raise UsageError("the client sent a compressed message that is too large")
            return self._unpacker.decompress(data, max_output_size=MAX_UNPACKED_BYTES)
        except zstandard.ZstdError as error:
            raise UsageError("the client sent damaged compressed data") from error

    def _drop_partial(self) -> None:
        if self._partial is not None:
            self._store.close_later(self._partial)
            self._partial = None
