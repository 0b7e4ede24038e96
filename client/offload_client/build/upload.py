"""Sending the content that the node lacks: small files in compressed batches, large in chunks."""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import TYPE_CHECKING

from offload_core.errors import ContextChangedError, NodeLostError, OffloadError
from offload_proto.v1.node_service_pb2 import (
    BlobBatch,
    BlobChunk,
    BlobFailure,
    RunRequest,
    UploadRequest,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from grpc import aio

    from offload_client.context.scan import TreeEntry
    from offload_client.progress.display import Display
    from offload_client.progress.local import LocalStep

BATCH_BYTES = 1 << 20
"""One zstd frame of about this size; 3.6 times smaller than source files, at 400 MB per CPU s."""
BATCH_FILES = 4096
"""Bounds a message of tiny files, whose digests are larger than they are."""
LARGE_BYTES = 256 << 10
CHUNK_BYTES = 1 << 20
WORTH_RATIO = 0.9
"""Below this a sample counts as compressible."""
SAMPLE_BYTES = 64 << 10
COUNTER = "transferring files:"


class Uploader:
    """The upload stream of one build; opened with the first blob that the node asks for."""

    def __init__(
        self,
        blobs: aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        say: Callable[[RunRequest], Awaitable[None]],
        display: Display,
    ) -> None:
        """Prepare an upload.

        Args:
            blobs: channel to the node.
            metadata: metadata of the call, with the build's id.
            say: sends a message on the control stream.
            display: shows a step with what was sent, as soon as something is.
        """
        self._channel = blobs
        self._metadata = metadata
        self._say = say
        self._display = display
        self._step: LocalStep | None = None
        self._sent_bytes = 0
        self._wanted_bytes = 0
        self._failure: Exception | None = None
        self._files: dict[bytes, tuple[Path, TreeEntry]] = {}
        self._wanted: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._compress = _compressor()

    def offer(self, root: Path, entries: list[TreeEntry]) -> None:
        """Remember where content can be read that the node may ask for."""
        for entry in entries:
            if entry.sha256:
                self._files.setdefault(entry.sha256, (root, entry))

    def want(self, digests: list[bytes]) -> None:
        """Queue blobs for sending."""
        self._wanted.put_nowait(digests)

    async def run(self) -> None:
        """Send until cancelled.

        Raises:
            NodeLostError: the stream to the node broke.
            ContextError: the directory of the build context cannot be opened any more.
        """
        import grpc

        from offload_core.status import error_from_rpc
        from offload_proto.v1.node_service_pb2_grpc import BlobsServiceStub

        first = await self._wanted.get()
        self._wanted.put_nowait(first)
        call = BlobsServiceStub(self._channel).Upload(self._requests(), metadata=self._metadata)
        try:
            async for _ in call:
                pass
            raise self._failure or NodeLostError("the node ended the upload of the build context")
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer="the node",
                unreachable=NodeLostError,
            ) from error
        finally:
            call.cancel()
            self.close()

    def close(self) -> None:
        """End the step."""
        if self._step is not None:
            self._step.progress_done(COUNTER)
            self._step.done()
            self._step = None
            self._sent_bytes = self._wanted_bytes = 0

    def _count(self, sent_bytes: int) -> None:
        if self._step is None:
            self._step = self._display.local_step(
                "[offload] sending new files of the build context"
            )
        self._sent_bytes += sent_bytes
        self._step.progress(COUNTER, self._sent_bytes, self._wanted_bytes)

    async def _requests(self) -> AsyncIterator[UploadRequest]:
        # gRPC would turn an error in here into a cancelled call without a word.
        try:
            async for message in self._messages():
                yield message
        except (OffloadError, OSError) as error:
            self._failure = error

    async def _messages(self) -> AsyncIterator[UploadRequest]:
        while True:
            queued = await self._wanted.get()
            while not self._wanted.empty():
                queued = queued + self._wanted.get_nowait()
            # One content may be wanted under several names; it travels once.
            digests = list(dict.fromkeys(queued))
            self._wanted_bytes += sum(map(self._size, digests))
            small = [item for item in digests if self._size(item) <= LARGE_BYTES]
            large = [item for item in digests if self._size(item) > LARGE_BYTES]
            async for message in self._batches(small):
                yield message
            for digest in large:
                async for message in self._chunks(digest):
                    yield message
            if self._wanted.empty():
                self.close()

    def _size(self, digest: bytes) -> int:
        known = self._files.get(digest)
        return known[1].size_bytes if known else 0

    async def _batches(self, digests: list[bytes]) -> AsyncIterator[UploadRequest]:
        start = 0
        while start < len(digests):
            end, total = start, 0
            limit = min(len(digests), start + BATCH_FILES)
            while end < limit and (end == start or total < BATCH_BYTES):
                total += self._size(digests[end])
                end += 1
            batch, failures = await asyncio.to_thread(self._read_batch, digests[start:end])
            for failure in failures:
                await self._say(RunRequest(blob_failure=failure))
            if batch.sha256:
                yield UploadRequest(batch=batch)
                self._count(sum(batch.sizes))
            start = end

    def _read_batch(self, digests: list[bytes]) -> tuple[BlobBatch, list[BlobFailure]]:
        from offload_client.context.reader import read_small

        batch = BlobBatch()
        failures = [_failure(digest, None) for digest in digests if digest not in self._files]
        known = [digest for digest in digests if digest in self._files]
        pieces: list[bytes] = []
        for root, group in groupby(known, key=lambda digest: self._files[digest][0]):
            members = list(group)
            contents = read_small(root, [self._files[digest][1] for digest in members])
            for digest, content in zip(members, contents, strict=True):
                if isinstance(content, ContextChangedError):
                    failures.append(_failure(digest, content))
                    continue
                pieces.append(content)
                batch.sha256.append(digest)
                batch.sizes.append(len(content))
        batch.data, batch.zstd = self._packed(b"".join(pieces))
        return batch, failures

    async def _chunks(self, digest: bytes) -> AsyncIterator[UploadRequest]:
        from offload_client.context.reader import read_blob

        root, entry = self._files[digest]
        reader = read_blob(root, entry, chunk_bytes=CHUNK_BYTES)
        offset = 0
        worth: bool | None = None
        while True:
            try:
                data = await asyncio.to_thread(next, reader, None)
            except ContextChangedError as error:
                await self._say(RunRequest(blob_failure=_failure(digest, error)))
                return
            if data is None:
                break
            if worth is None:
                worth = await asyncio.to_thread(self._compresses, bytes(data[:SAMPLE_BYTES]))
            size = len(data)
            packed, zstd = (
                await asyncio.to_thread(self._packed, bytes(data))
                if worth
                else (bytes(data), False)
            )
            yield UploadRequest(
                chunk=BlobChunk(
                    sha256=digest,
                    size_bytes=entry.size_bytes,
                    offset_bytes=offset,
                    data=packed,
                    zstd=zstd,
                )
            )
            offset += size
            self._count(size)

    def _compresses(self, sample: bytes) -> bool:
        return self._compress is not None and len(self._compress(sample)) < WORTH_RATIO * len(
            sample
        )

    def _packed(self, data: bytes) -> tuple[bytes, bool]:
        if not self._compresses(data[:SAMPLE_BYTES]) or self._compress is None:
            return data, False
        return self._compress(data), True


def _compressor() -> Callable[[bytes], bytes] | None:
    try:
        import zstandard
    except ImportError:
        # The package is optional for the client; without it bytes travel as they are.
        return None
    return lambda data: zstandard.ZstdCompressor(level=1).compress(data)


def _failure(digest: bytes, error: ContextChangedError | None) -> BlobFailure:
    unknown = "the node asked for a file that is not part of the build context"
    return BlobFailure(sha256=digest, message=error.message if error else unknown)
