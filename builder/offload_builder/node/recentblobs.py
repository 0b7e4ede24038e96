"""The content that has arrived last, in memory: who waits for it need not read it from the disk."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

RECENT_BYTES = 8 << 20
"""Per build; what BuildKit waits for is mostly in the batch that has just come."""


class RecentBlobs:
    """Verified content, each blob given out once; the oldest batch goes when there is too much."""

    def __init__(self, limit_bytes: int = RECENT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._blobs: dict[bytes, bytes | memoryview] = {}
        self._batches: deque[tuple[int, list[bytes]]] = deque()
        self._bytes = 0

    def add(self, blobs: Sequence[tuple[bytes, bytes | memoryview]]) -> None:
        """Keep the blobs of one message for a while."""
        size = sum(len(data) for _, data in blobs)
        self._batches.append((size, [digest for digest, _ in blobs]))
        self._bytes += size
        self._blobs.update(blobs)
        while self._bytes > self._limit_bytes:
            size, digests = self._batches.popleft()
            self._bytes -= size
            for digest in digests:
                self._blobs.pop(digest, None)

    def take(self, digest: bytes) -> bytes | memoryview | None:
        """Return a blob and forget it; None when it is not kept."""
        return self._blobs.pop(digest, None)

    def clear(self) -> None:
        """Forget everything."""
        self._blobs.clear()
        self._batches.clear()
        self._bytes = 0
