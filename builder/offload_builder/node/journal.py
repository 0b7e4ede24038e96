"""The record of one build's progress: on disk, numbered, read by any number of viewers.

Every viewer has its own position in the file, so a slow client or gateway costs disk, not memory,
and never holds up the build.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.faults import storage_error
from offload_proto.v1.events_pb2 import ProgressBatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger(__name__)

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 << 10


class Journal:
    """Append-only file of ProgressBatch messages, each behind its length (4 bytes, big endian).

    Raises:
        QuotaExceededError: the disk is full.
        NodeLostError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("keep the log of the build", error) from error
        self._end = 0
        self._sequence = 0
        self._readers = 0
        self._removed = False
        self._changed = asyncio.Event()
        self.finished = asyncio.Event()
        self.lost_batches = 0
        """Batches that could not be written because of the disk."""

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

    def append(self, batch: ProgressBatch) -> bool:
        """Number a batch and write it; after `finish` nothing is taken any more.

        Returns:
            False when the disk did not take it: the build goes on, its log has a gap.
        """
        if self.finished.is_set():
            return True
        batch.sequence = self._sequence + 1
        data = batch.SerializeToString()
        try:
            # A write to the page cache; a thread hand-over would cost more than the write.
            self._write(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            if self.lost_batches == 0:
                log.error("journal.write.failed", path=str(self._path), error=str(error))
            self.lost_batches += 1
            return False
        self._sequence += 1
        self._end += _LENGTH.size + len(data)
        self._wake()
        return True

    def _write(self, data: bytes) -> None:
        # Nothing before `_end` changes: a write that fails half-way is overwritten by the next.
        view, position = memoryview(data), self._end
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written

    def finish(self) -> None:
        """Say that no more batches come; viewers end when they have read everything."""
        self.finished.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int = 0) -> AsyncGenerator[list[ProgressBatch]]:
        """Yield runs of batches beyond sequence `after`, until `finish`; waits for new ones.

        A viewer that has begun reads to the end also after `remove`; close what is left early.
        """
        if self._file < 0:
            return
        self._readers += 1
        try:
            offset = 0
            while True:
                changed = self._changed
                while offset < self._end:
                    batches, used = self._read_at(offset)
                    offset += used
                    batches = [batch for batch in batches if batch.sequence > after]
                    if batches:
                        yield batches
                if self.finished.is_set() and offset >= self._end:
                    return
                await changed.wait()
        finally:
            self._readers -= 1
            self._close_unused()

    def _read_at(self, offset: int) -> tuple[list[ProgressBatch], int]:
        data = os.pread(self._file, min(_READ_BYTES, self._end - offset), offset)
        batches, used = _decode(data)
        if used == 0:
            (size,) = _LENGTH.unpack_from(data)
            data = os.pread(self._file, _LENGTH.size + size, offset)
            batches, used = _decode(data)
        return batches, used

    def remove(self) -> None:
        """Delete the file; it is closed when the last viewer has read it."""
        self.finish()
        if not self._removed:
            self._removed = True
            self._path.unlink(missing_ok=True)
            self._close_unused()

    def _close_unused(self) -> None:
        if self._removed and self._readers == 0 and self._file >= 0:
            os.close(self._file)
            self._file = -1


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
