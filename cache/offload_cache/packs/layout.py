"""The form of a pack and of its index.

A pack is one object: frames one after the other, nothing between them. A frame holds whole blobs,
about 1 MiB of them, as one zstd frame, or as they are when compression does not pay. What a pack
holds is said by its index, a small object of its own: it is written after the pack, so whoever
sees the index can read the pack. Index, compressed as one zstd frame with a checksum, all numbers
little-endian:

    8 bytes   magic
    u32 u32   number of frames, number of blobs
    13 bytes  for each frame: stored bytes, bytes, blobs (u32 each), 1 when it is not compressed
    u32       for each blob, frame by frame: its bytes
    32 bytes  for each blob: its SHA-256
"""

from __future__ import annotations

import secrets
import struct
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import zstandard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHA256_BYTES = 32
FRAME_BYTES = 1 << 20
"""A frame is closed when it has so much; little enough to fetch it for one small file."""
MAX_BLOB_BYTES = 16 << 20
"""Larger than any blob of a build context: pieces, chunk lists and pages have bounds below it."""
MAX_FRAME_BYTES = FRAME_BYTES + MAX_BLOB_BYTES
PACK_BYTES = 32 << 20
MAX_PACK_BLOBS = 50_000
MAX_INDEX_BYTES = 4 << 20
_COMPRESSION_LEVEL = 3
_WORTHWHILE = 0.95
"""A frame that compression leaves larger than this share of its bytes is stored as it is."""
_MAGIC = b"obpack\x00\x01"
_HEADER = struct.Struct("<8sII")
_FRAME = struct.Struct("<IIIB")


class DamagedPackError(ValueError):
    """A pack or its index is not what a node writes."""


class Frame(NamedTuple):
    """One frame; its place in the pack follows from the frames before it."""

    stored_bytes: int
    size_bytes: int
    blobs: int
    raw: bool


@dataclass(slots=True)
class PackIndex:
    """What a pack holds.

    Attributes:
        frames: in their order in the pack.
        sizes_bytes: of each blob, frame by frame.
        digests: 32 bytes for each blob.
    """

    frames: list[Frame] = field(default_factory=list)
    sizes_bytes: list[int] = field(default_factory=list)
    digests: bytes = b""

    @property
    def stored_bytes(self) -> int:
        """Size of the pack."""
        return sum(frame.stored_bytes for frame in self.frames)

    def blobs(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yield digest, number of the frame, position in it and size of each blob."""
        blob = 0
        for number, frame in enumerate(self.frames):
            position = 0
            for size in self.sizes_bytes[blob : blob + frame.blobs]:
                start = blob * SHA256_BYTES
                yield self.digests[start : start + SHA256_BYTES], number, position, size
                position += size
                blob += 1

    def offsets(self) -> list[int]:
        """Return where each frame begins in the pack."""
        return list(accumulate((frame.stored_bytes for frame in self.frames[:-1]), initial=0))


def new_pack_name() -> str:
    """Return a name that no other pack has; names sort by the time they were made."""
    return f"{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(8)}"


def pack_made_at(name: str) -> float:
    """Return when a name was made, in seconds since 1970 UTC; 0 for what is no such name."""
    try:
        return int(name[:12], 16) / 1000
    except ValueError:
        return 0.0


def encode_index(index: PackIndex) -> bytes:
    """Return the index as an object of the shared store."""
    data = b"".join(
        (
            _HEADER.pack(_MAGIC, len(index.frames), len(index.sizes_bytes)),
            *(_FRAME.pack(*frame) for frame in index.frames),
            struct.pack(f"<{len(index.sizes_bytes)}I", *index.sizes_bytes),
            index.digests,
        )
    )
    return zstandard.ZstdCompressor(_COMPRESSION_LEVEL, write_checksum=True).compress(data)


def decode_index(data: bytes) -> PackIndex:
    """Return an index whose numbers fit together.

    Raises:
        DamagedPackError: it is none, or it names more than a node puts into one pack.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not _HEADER.size <= size <= MAX_INDEX_BYTES:
            raise DamagedPackError("the index of a pack has an impossible size")
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_INDEX_BYTES)
    except zstandard.ZstdError as error:
        raise DamagedPackError("the index of a pack cannot be unpacked") from error
    magic, frame_count, blob_count = _HEADER.unpack_from(plain)
    sizes_at = _HEADER.size + _FRAME.size * frame_count
    digests_at = sizes_at + 4 * blob_count
    if magic != _MAGIC or len(plain) != digests_at + SHA256_BYTES * blob_count:
        raise DamagedPackError("the index of a pack has an unknown form")
    frames = [
        Frame(stored, size_bytes, blobs, bool(raw))
        for stored, size_bytes, blobs, raw in _FRAME.iter_unpack(plain[_HEADER.size : sizes_at])
    ]
    sizes = list(struct.unpack(f"<{blob_count}I", plain[sizes_at:digests_at]))
    _check(frames, sizes)
    return PackIndex(frames, sizes, plain[digests_at:])


def _check(frames: Sequence[Frame], sizes: Sequence[int]) -> None:
    blob = 0
    for frame in frames:
        held = sizes[blob : blob + frame.blobs]
        blob += frame.blobs
        if (
            len(held) != frame.blobs
            or sum(held) != frame.size_bytes
            or max(frame.size_bytes, frame.stored_bytes) > MAX_FRAME_BYTES
            or (frame.raw and frame.stored_bytes != frame.size_bytes)
        ):
            raise DamagedPackError("the index of a pack contradicts itself")
    if blob != len(sizes):
        raise DamagedPackError("the index of a pack contradicts itself")


def pack_frame(data: bytes, compressor: zstandard.ZstdCompressor) -> tuple[bytes, bool]:
    """Return a frame as it is stored, and whether it is raw."""
    packed = compressor.compress(data)
    if len(packed) > _WORTHWHILE * len(data):
        return data, True
    return packed, False


def frame_compressor() -> zstandard.ZstdCompressor:
    """Return a compressor for `pack_frame`; one thread at a time may use it."""
    return zstandard.ZstdCompressor(_COMPRESSION_LEVEL)


def unpack_frame(stored: memoryview | bytes, size_bytes: int, *, raw: bool) -> memoryview:
    """Return the bytes of a frame.

    Raises:
        DamagedPackError: it does not hold `size_bytes`.
    """
    if raw:
        plain = memoryview(stored)
    else:
        try:
            # The frame's own word on its size is not trusted: it decides what is allocated.
            if zstandard.frame_content_size(stored) != size_bytes:
                raise DamagedPackError("a frame of a pack has the wrong size")
            plain = memoryview(zstandard.ZstdDecompressor().decompress(stored))
        except zstandard.ZstdError as error:
            raise DamagedPackError("a frame of a pack cannot be unpacked") from error
    if len(plain) != size_bytes:
        raise DamagedPackError("a frame of a pack has the wrong size")
    return plain
