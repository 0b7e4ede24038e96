"""Blobs that wait to be packed: digests, 32 bytes each and nothing more."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from offload_cache.packs.layout import SHA256_BYTES
from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_PENDING_BYTES = 64 << 20
"""Two million blobs; what comes beyond is not shared."""


class PendingBlobs:
    """A queue of digests, in the order in which they came: neighbours stay neighbours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: deque[bytes] = deque()
        self._size_bytes = 0
        self.dropped = 0

    def __len__(self) -> int:
        return self._size_bytes // SHA256_BYTES

    def add(self, digests: Sequence[bytes]) -> None:
        """Append digests; they are dropped when far too many wait."""
        part = b"".join(digests)
        if self._size_bytes + len(part) > MAX_PENDING_BYTES:
            self.dropped += len(digests)
            return
        self._parts.append(part)
        self._size_bytes += len(part)

    def take(self, count: int) -> list[bytes]:
        """Remove and return at most `count` digests."""
        found: list[bytes] = []
        while self._parts and len(found) < count:
            part = self._parts.popleft()
            end = (count - len(found)) * SHA256_BYTES
            if len(part) > end:
                self._parts.appendleft(part[end:])
                part = part[:end]
            found += [part[at : at + SHA256_BYTES] for at in range(0, len(part), SHA256_BYTES)]
            self._size_bytes -= len(part)
        return found

    def give_back(self, digests: Sequence[bytes]) -> None:
        """Put digests that could not be packed now to the front."""
        if digests:
            part = b"".join(digests)
            self._parts.appendleft(part)
            self._size_bytes += len(part)

    def snapshot(self) -> bytes:
        """Return all digests for `save`."""
        return b"".join(self._parts)

    def save(self, snapshot: bytes) -> None:
        """Write digests down for the next start; blocks."""
        try:
            if not snapshot:
                self._path.unlink(missing_ok=True)
                return
            replace_small_file(self._path, snapshot)
        except OSError:
            # They are then not shared; their builds are not concerned.
            return

    def load(self) -> None:
        """Take in what was saved; blocks."""
        try:
            data = self._path.read_bytes()[:MAX_PENDING_BYTES]
        except OSError:
            return
        data = data[: len(data) // SHA256_BYTES * SHA256_BYTES]
        if data:
            self._parts.append(data)
            self._size_bytes += len(data)
