"""The record of one build's progress: on disk, numbered, read by any number of viewers.

Every viewer has its own position in the file, so a slow client or gateway costs disk, not memory,
and never holds up the build.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING, Self

from offload_proto.v1.events_pb2 import ProgressBatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import TracebackType

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 << 10


class Journal:
    """Append-only file of ProgressBatch messages, each behind its length (4 bytes, big endian)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._sequence = 0
        self._changed = asyncio.Event()
        self.finished = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def sequence(self) -> int:
        """Number of the last batch."""
        return self._sequence

    def append(self, batch: ProgressBatch) -> None:
        """Number a batch and write it; after `finish` nothing is taken any more."""
        if self.finished.is_set():
            return
        self._sequence += 1
        batch.sequence = self._sequence
        data = batch.SerializeToString()
        # A write to the page cache; a thread hand-over would cost more than the write.
        os.pwrite(self._file, _LENGTH.pack(len(data)) + data, self._end)
        self._end += _LENGTH.size + len(data)
        self._wake()

    def finish(self) -> None:
        """Say that no more batches come; viewers end when they have read everything."""
        self.finished.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int = 0) -> AsyncIterator[list[ProgressBatch]]:
        """Yield runs of batches beyond sequence `after`, until `finish`; waits for new ones."""
        offset = 0
        while True:
            changed = self._changed
            while offset < self._end:
                data = os.pread(self._file, _READ_BYTES, offset)
                batches, used = _decode(data)
                if used == 0:
                    (size,) = _LENGTH.unpack_from(data)
                    data = os.pread(self._file, _LENGTH.size + size, offset)
                    batches, used = _decode(data)
                offset += used
                batches = [batch for batch in batches if batch.sequence > after]
                if batches:
                    yield batches
            if self.finished.is_set() and offset >= self._end:
                return
            await changed.wait()

    def remove(self) -> None:
        """Close and delete the file."""
        self.finish()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)


def _decode(data: bytes) -> tuple[list[ProgressBatch], int]:
    batches: list[ProgressBatch] = []
    offset = 0
    while offset + _LENGTH.size <= len(data):
        (size,) = _LENGTH.unpack_from(data, offset)
        end = offset + _LENGTH.size + size
        if end > len(data):
            break
        batches.append(ProgressBatch.FromString(data[offset + _LENGTH.size : end]))
        offset = end
    return batches, offset
