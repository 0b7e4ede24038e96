"""Content on its way: which parts are wanted, and how they are read and packed."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

from offload_core.chunklist import MAX_CHUNK_BYTES, MAX_LIST_BYTES
from offload_core.errors import UsageError
from offload_core.filedigest import read_at
from offload_core.treesync.entries import check_path
from offload_proto.v1.session_sync_service_pb2 import SyncContent, SyncPart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from offload_core.treesync.replica import Replica

MESSAGE_BYTES = 1 << 20
"""Of content in one message, unless one part is larger."""
GONE = -1
_COMPRESS_FROM = 512
_WORTH_RATIO = 0.9
_LEVEL = 1


class Part(NamedTuple):
    """A run of bytes of a file.

    Attributes:
        sha256: of the bytes.
        size_bytes: 0 for the chunk list of the file.
        path: of a file with these bytes.
        offset: where they begin.
    """

    sha256: bytes
    size_bytes: int
    path: str
    offset: int = 0

    @property
    def cost(self) -> int:
        """Bytes of memory that it may take."""
        return self.size_bytes or 1 << 20

    def message(self) -> SyncPart:
        """Return what travels."""
        return SyncPart(
            sha256=self.sha256,
            size_bytes=self.size_bytes,
            path=os.fsencode(self.path),
            offset=self.offset,
        )


def part_of(message: SyncPart) -> Part:
    """Return a part that the other side wants.

    Raises:
        UsageError: it makes no sense.
    """
    if not 0 <= message.size_bytes <= MAX_CHUNK_BYTES or message.offset < 0:
        raise UsageError("the other side of a synchronised directory wants what cannot be")
    return Part(message.sha256, message.size_bytes, check_path(message.path), message.offset)


class ContentReader:
    """Reads what the other side wants; for the thread of the replica.

    Only files that are synchronised are read, and only when they have the digest that was asked
    for: naming a path gives the other side nothing that it has not been listed.
    """

    def __init__(self, replica: Replica, *, zstd: bool) -> None:
        """Prepare.

        Args:
            replica: whose files.
            zstd: the other side can read it.
        """
        self._replica = replica
        self._compress = None
        if zstd and zstd_usable():
            import zstandard

            self._compress = zstandard.ZstdCompressor(level=_LEVEL).compress

    def read(self, parts: Iterable[Part]) -> SyncContent:
        """Return the content of some parts, those that are gone included."""
        found = [(part, self._read(part)) for part in parts]
        data = b"".join([content or b"" for _, content in found])
        message = SyncContent(
            sha256=[part.sha256 for part, _ in found],
            sizes_bytes=[GONE if content is None else len(content) for _, content in found],
        )
        if self._compress is not None and _COMPRESS_FROM <= len(data) <= MESSAGE_BYTES:
            packed = self._compress(data)
            if len(packed) < _WORTH_RATIO * len(data):
                message.data, message.zstd = packed, True
                return message
        message.data = data
        return message

    def _read(self, part: Part) -> bytes | None:
        if not self._replica.entry(part.path).is_file:
            return None
        if not part.size_bytes:
            return self._replica.chunk_list(part.path, part.sha256)
        try:
            fd = self._replica.tree.open_file(part.path)
            try:
                data = read_at(fd, part.offset, part.size_bytes)
            finally:
                os.close(fd)
        except OSError:
            return None
        if hashlib.sha256(data).digest() != part.sha256:
            return None
        return data


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield parts in groups that fit into one message."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.cost > MESSAGE_BYTES:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.cost
    if group:
        yield group


def unpack(message: SyncContent) -> list[tuple[bytes, bytes | None]]:
    """Return digests and their content, which was verified; None for what is gone or damaged.

    Raises:
        UsageError: the message makes no sense.
    """
    sizes = [max(size, 0) for size in message.sizes_bytes]
    total = sum(sizes)
    data: bytes = message.data
    if total > MESSAGE_BYTES + MAX_LIST_BYTES or len(sizes) != len(message.sha256):
        raise _damaged()
    if message.zstd:
        import zstandard

        try:
            # The frame must not say more than it may, for the memory is taken before it is read.
            if zstandard.frame_content_size(data) != total:
                raise _damaged()
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=total)
        except zstandard.ZstdError as error:
            raise _damaged() from error
    if len(data) != total:
        raise _damaged()
    found: list[tuple[bytes, bytes | None]] = []
    at = 0
    for digest, stated, size in zip(message.sha256, message.sizes_bytes, sizes, strict=True):
        content = data[at : at + size]
        at += size
        whole = stated >= 0 and hashlib.sha256(content).digest() == digest
        found.append((digest, content if whole else None))
    return found


def zstd_usable() -> bool:
    """Return whether this side can write and read zstd; the package is optional for clients."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def _damaged() -> UsageError:
    return UsageError("the other side of a synchronised directory sent damaged content")
