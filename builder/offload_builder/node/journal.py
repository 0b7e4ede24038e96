"""The record of one build's progress: on disk, numbered, read by any number of viewers.

Every viewer has its own position in the file, so a slow client or gateway costs disk, not memory,
and never holds up the build.
"""

from __future__ import annotations

import asyncio
import os
import struct
from array import array
from typing import TYPE_CHECKING, Self

import structlog
import zstandard
from google.protobuf.message import DecodeError

from offload_builder.node.faults import storage_error
from offload_proto.v1.events_pb2 import ProgressBatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger(__name__)

_LENGTH = struct.Struct(">I")
_READ_BYTES = 256 << 10
_PACKED = 1 << 31
"""Set in the length of a record that is a zstd frame."""
_PACK_BYTES = 4 << 10
_MARK_BATCHES = 64
_ZSTD_LEVEL = 1
"""Takes less time than writing what it saves."""


class Journal:
    """Append-only file of ProgressBatch messages, each behind its length (4 bytes, big endian).

    Large ones, which are output of steps, are compressed.

    Raises:
        QuotaExceededError: the disk is full.
        NodeLostError: the file cannot be made.
    """

    def __init__(self, path: Path, *, fresh: bool = True) -> None:
        """Open a journal.

        Args:
            path: of its file.
            fresh: what was there before goes; else it is `restored`, and may be gone.
        """
        self._path = path
        self._removed = False
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if fresh else 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            if fresh or not isinstance(error, FileNotFoundError):
                raise storage_error("keep the log of the build", error) from error
            self._file, self._removed = -1, True
        self._pack = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
        self._end = 0
        self._sequence = 0
        self._marks = array("Q")
        """Where every so many batches begin, so that who comes back need not read all again."""
        self._readers = 0
        self._changed = asyncio.Event()
        self.finished = asyncio.Event()
        self.lost_batches = 0
        """Batches that could not be written because of the disk."""

    @classmethod
    def restored(cls, path: Path, *, check: bool) -> Self:
        """Return the journal that a former process left, as far as it is whole; it is finished.

        One that was removed has nothing in it, and holds no file open.

        Goes through the file: call it in a thread.

        Args:
            path: of its file.
            check: the process may have died while it wrote.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the file cannot be read.
        """
        journal = cls(path, fresh=False)
        try:
            if not journal.removed:
                journal._scan(check=check)
        except OSError as error:
            journal.close()
            raise storage_error("read the log of a former build", error) from error
        journal.finished.set()
        return journal

    def _scan(self, *, check: bool) -> None:
        size = os.fstat(self._file).st_size
        while self._end + _LENGTH.size <= size:
            (length,) = _LENGTH.unpack(os.pread(self._file, _LENGTH.size, self._end))
            start = self._end + _LENGTH.size
            end = start + (length & ~_PACKED)
            if end > size:
                return
            if check and not self._is_next(os.pread(self._file, end - self._end, self._end)):
                return
            self._added(end)

    def _added(self, end: int) -> None:
        if self._sequence % _MARK_BATCHES == 0:
            self._marks.append(self._end)
        self._sequence, self._end = self._sequence + 1, end

    def _is_next(self, record: bytes) -> bool:
        try:
            batches, _ = _decode(record)
        except (DecodeError, zstandard.ZstdError):
            return False
        return batches[0].sequence == self._sequence + 1

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
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self._end

    @property
    def removed(self) -> bool:
        """Whether it takes nothing more and its file is gone, or left alone."""
        return self._removed

    @property
    def sequence(self) -> int:
        """Number of the last batch."""
        return self._sequence

    def append(
        self,
        batch: ProgressBatch,
        secret: bytes = b"",
        hide: Callable[[ProgressBatch], None] | None = None,
    ) -> bool:
        """Number a batch and write it; after `finish` nothing is taken any more.

        Args:
            batch: what happened.
            secret: must not be written; empty for nothing.
            hide: takes it out of a batch.

        Returns:
            False when the disk did not take it: the build goes on, its log has a gap.
        """
        if self.finished.is_set():
            return True
        batch.sequence = self._sequence + 1
        data = batch.SerializeToString()
        if secret and hide is not None and secret in data:
            hide(batch)
            data = batch.SerializeToString()
        mark = 0
        if len(data) >= _PACK_BYTES:
            data, mark = self._pack(data), _PACKED
        try:
            # A write to the page cache; a thread hand-over would cost more than the write.
            self._write(_LENGTH.pack(len(data) | mark) + data)
        except OSError as error:
            if self.lost_batches == 0:
                log.error("journal.write.failed", path=str(self._path), error=str(error))
            self.lost_batches += 1
            return False
        self._added(self._end + _LENGTH.size + len(data))
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
            mark = max(0, min(after, self._sequence)) // _MARK_BATCHES
            offset = self._marks[mark] if mark < len(self._marks) else self._end
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
            data = os.pread(self._file, _LENGTH.size + (size & ~_PACKED), offset)
            batches, used = _decode(data)
        return batches, used

    def remove(self) -> None:
        """Delete the file; it is closed when the last viewer has read it."""
        if not self._removed:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Take nothing more; the file is closed when the last viewer has read it, and stays."""
        self.finish()
        if not self._removed:
            self._removed = True
            self._close_unused()

    def _close_unused(self) -> None:
        if self._removed and self._readers == 0 and self._file >= 0:
            os.close(self._file)
            self._file = -1


def _decode(data: bytes) -> tuple[list[ProgressBatch], int]:
    unpack = zstandard.ZstdDecompressor().decompress
    batches: list[ProgressBatch] = []
    offset = unpacked = 0
    while offset + _LENGTH.size <= len(data):
        (size,) = _LENGTH.unpack_from(data, offset)
        start = offset + _LENGTH.size
        end = start + (size & ~_PACKED)
        if end > len(data):
            break
        record = data[start:end]
        if size & _PACKED:
            record = unpack(record)
        batches.append(ProgressBatch.FromString(record))
        offset = end
        unpacked += len(record)
        if unpacked >= _READ_BYTES:
            break
    return batches, offset
