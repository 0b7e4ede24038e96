"""Batches as messages of the wire, compressed when the link is slower than the compressor."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Self

from offload_proto.v1.node_service_pb2 import BlobBatch, UploadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_client.build.demand import Wanted
    from offload_client.build.readahead import Batch

LEVEL = 1
"""3.6 times smaller than source files, at 400 MB per CPU second."""
WORTH_RATIO = 0.9
"""What does not become smaller than this goes as it is."""
SAMPLES = 4
SAMPLE_BYTES = 8 << 10
SMALL_BYTES = 1 << 10
"""Not worth a frame of its own."""
FEW_BATCHES = 3
"""With fewer under way the link waits for the compressor."""

_BATCH_TAG = bytes([UploadRequest.BATCH_FIELD_NUMBER << 3 | 2])
_DATA_TAG = bytes([BlobBatch.DATA_FIELD_NUMBER << 3 | 2])


class PackedBatch(NamedTuple):
    """A message that is ready to be sent."""

    message: bytes
    """A serialised UploadRequest."""
    parts: list[Wanted]
    total_bytes: int
    """Of its blobs, before compression."""
    zstd: bool


class Packer:
    """Turns batches into messages, in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._compress = compressor(LEVEL)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="context-zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def pack(self, batch: Batch, *, compress: bool) -> PackedBatch:
        """Return a batch as a message.

        Args:
            batch: with at least one blob.
            compress: the link is worth it; a sample says whether the content is.
        """
        loop = asyncio.get_running_loop()
        contents: Sequence[bytes] = batch.contents
        zstd = False
        if compress and self._compress is not None and batch.total_bytes >= SMALL_BYTES:
            packed = await loop.run_in_executor(
                self._thread, _smaller, self._compress, batch.contents
            )
            if packed is not None:
                contents, zstd = [packed], True
        message = encode_upload(batch.sha256, batch.sizes, contents, zstd=zstd)
        return PackedBatch(message, batch.parts, batch.total_bytes, zstd)


def compressor(level: int) -> Callable[[bytes], bytes] | None:
    """Return what makes one zstd frame with its content size, for one thread at a time.

    None where the package is not installed: it is optional for the client, and without it bytes
    travel as they are.
    """
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard.ZstdCompressor(level=level).compress


def _smaller(compress: Callable[[bytes], bytes], contents: Sequence[bytes]) -> bytes | None:
    data = contents[0] if len(contents) == 1 else b"".join(contents)
    if len(data) > 2 * SAMPLES * SAMPLE_BYTES:
        step = (len(data) - SAMPLE_BYTES) // (SAMPLES - 1)
        sample = b"".join(data[at : at + SAMPLE_BYTES] for at in range(0, len(data), step))
        if len(compress(sample)) > WORTH_RATIO * len(sample):
            return None
    packed = compress(data)
    return packed if len(packed) <= WORTH_RATIO * len(data) else None


def encode_upload(
    sha256: Sequence[bytes], sizes: Sequence[int], contents: Sequence[bytes], *, zstd: bool
) -> bytes:
    """Return a serialised UploadRequest.

    The content is put behind the other fields by hand, which protobuf allows in any order: it is
    copied once this way, and not three times.
    """
    head = BlobBatch(sha256=sha256, sizes=sizes, zstd=zstd).SerializeToString()
    data_bytes = sum(map(len, contents))
    head += _DATA_TAG + _varint(data_bytes)
    return b"".join((_BATCH_TAG, _varint(len(head) + data_bytes), head, *contents))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
