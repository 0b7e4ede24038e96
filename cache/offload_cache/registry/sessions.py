"""One upload that is under way, and how long it may take."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_cache.registry.responses import RegistryError

if TYPE_CHECKING:
    from aiohttp import StreamReader

    from offload_cache.blobwriter import BlobWriter
    from offload_cache.statistics import CacheStatistics

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What ends an upload whose client does not come to an end.

    Attributes:
        blob_bytes: largest blob.
        idle_seconds: between two requests of one upload.
        window_seconds: how long a client may send less than `window_bytes` within one request.
        window_bytes: see there. A client that pauses, and one that trickles, fall below it.
        total_seconds: from the first request to the last one.
    """

    blob_bytes: int = 32 << 30
    idle_seconds: float = 300.0
    window_seconds: float = 60.0
    window_bytes: int = 64 << 10
    total_seconds: float = 6 * 3600.0


@dataclass(slots=True)
class UploadSession:
    """One upload: its bytes so far, and whether a request adds to them just now."""

    name: str
    writer: BlobWriter
    limits: UploadLimits
    statistics: CacheStatistics
    began_at: float = field(default_factory=time.monotonic)
    used_at: float = field(default_factory=time.monotonic)
    _receiving: bool = False

    @property
    def range(self) -> str:
        """What was received, as the specification's Range header; `0-0` for nothing, too."""
        return f"0-{max(self.writer.size_bytes - 1, 0)}"

    @property
    def expired(self) -> bool:
        """Whether its client has left it, or takes too long."""
        now = time.monotonic()
        idle = not self._receiving and now - self.used_at > self.limits.idle_seconds
        return idle or now - self.began_at > self.limits.total_seconds

    async def receive(
        self, content: StreamReader, *, first: int | None, length: int | None
    ) -> None:
        """Append a request's body, at most two pieces of it in memory.

        Args:
            content: the body.
            first: offset that the client says the body has; None when it does not say.
            length: bytes that it says the body has; None when it does not say.

        Raises:
            RegistryError: the body does not continue the upload (416, the upload goes on), is
                too large (413), too slow (408) or not as long as announced (400).
            NotFoundError: the upload was ended.
            QuotaExceededError: the disk is full.
        """
        if self._receiving or (first is not None and first != self.writer.size_bytes):
            raise RegistryError(416, "BLOB_UPLOAD_INVALID", "the chunk is out of order")
        self._receiving = True
        try:
            await self._receive(content, length)
        finally:
            self._receiving = False
            self.used_at = time.monotonic()

    async def _receive(self, content: StreamReader, length: int | None) -> None:
        end = None if length is None else self.writer.size_bytes + length
        self._check_size(end or 0)
        pieces: list[bytes] = []
        waiting_bytes = 0
        pace = _Pace(self.limits)
        try:
            while True:
                data = await pace.next(content)
                if data:
                    pieces.append(data)
                    waiting_bytes += len(data)
                    self._check_size(self.writer.size_bytes + waiting_bytes)
                if waiting_bytes >= _PIECE_BYTES or not data:
                    await self._write(pieces, waiting_bytes)
                    pieces, waiting_bytes = [], 0
                if not data:
                    break
        finally:
            # What came before a connection broke counts: the client asks how far it got.
            await self.writer.settle()
        await self.writer.flush()
        if end is not None and self.writer.size_bytes != end:
            raise RegistryError(400, "SIZE_INVALID", "the chunk has not the announced length")

    async def _write(self, pieces: list[bytes], size_bytes: int) -> None:
        if pieces:
            self.statistics.bytes_received += size_bytes
            await self.writer.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.limits.blob_bytes:
            raise RegistryError(
                413, "SIZE_INVALID", f"a blob may have {self.limits.blob_bytes} bytes"
            )


class _Pace:
    """Reads a body and gives up when it comes too slowly."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._began_at = time.monotonic()
        self._bytes = 0

    async def next(self, content: StreamReader) -> bytes:
        """Return what has arrived, b"" at the end.

        Raises:
            RegistryError: too little came within the window.
        """
        while True:
            deadline = self._began_at + self._limits.window_seconds
            try:
                # `readany` loses nothing when it is cancelled.
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    data = await content.readany()
            except TimeoutError:
                data = None
            self._bytes += len(data or b"")
            if data is not None and time.monotonic() < deadline:
                return data
            if self._bytes < self._limits.window_bytes and data != b"":
                raise RegistryError(408, "BLOB_UPLOAD_INVALID", "the upload is too slow")
            self._began_at, self._bytes = time.monotonic(), 0
            if data is not None:
                return data


def ended_upload() -> RegistryError:
    """Return the answer for an upload that ended while a request used it."""
    return RegistryError(404, "BLOB_UPLOAD_UNKNOWN", "this upload was ended")
