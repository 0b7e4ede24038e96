"""Large files of a build: their pieces are asked for a window at a time, in the order of the file.

A file of 10 GB has some 10,000 pieces. What is kept of it in memory is a few numbers: its chunk
list stays on the disk, and only the pieces of the window are on their way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from offload_builder.node.blobplaces import place_of
from offload_builder.node.blobreads import Blob, read_blob
from offload_builder.node.contextstore import ANY_SIZE
from offload_core.aio import TaskSet
from offload_core.chunklist import RECORD_BYTES, Chunk, decode_chunks, decode_records
from offload_core.errors import InternalError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from offload_builder.node.content import WantedFile
    from offload_builder.node.wantedblobs import WantedBlobs

WINDOW_PIECES = 1024
"""So many pieces are looked for at a time, and no more while half as many are on their way: some
500 MB, more than any link holds. Bounds also what a chunk list of 12 MiB costs."""
_PIECES_PER_READ = 256


class LargeFiles:
    """The large files that one build has asked for."""

    def __init__(self, blobs: WantedBlobs) -> None:
        self._blobs = blobs
        self._files: dict[bytes, _Progress] = {}
        self._queue: deque[tuple[WantedFile, _Progress]] = deque()
        self._tasks = TaskSet(self._task_failed)
        self._running = False

    def add(self, file: WantedFile) -> None:
        """Ask for the pieces of a file whose chunk list is here or on its way."""
        if file.sha256 in self._files:
            return
        progress = self._files[file.sha256] = _Progress()
        self._queue.append((file, progress))
        if not self._running:
            self._running = True
            self._tasks.start(self._run(), name="context-pieces")

    async def pieces(self, file: WantedFile) -> AsyncGenerator[Blob]:
        """Yield the pieces of a file in order, each as soon as it was asked for.

        Raises:
            UsageError: the chunk list is damaged.
            ContextChangedError: the client cannot deliver it.
        """
        progress = self._files[file.sha256]
        index = 0
        while not (progress.done and index == progress.asked):
            await progress.beyond(index)
            count = min(progress.asked - index, _PIECES_PER_READ)
            for chunk in await self._records(file, index, count):
                yield _piece(file, index, chunk)
                index += 1

    async def close(self) -> None:
        """Stop asking; safe to call again."""
        await self._tasks.close()

    async def _run(self) -> None:
        try:
            while self._queue:
                file, progress = self._queue.popleft()
                try:
                    await self._ask(file, progress)
                except OffloadError as error:
                    progress.fail(error)
        finally:
            self._running = False

    async def _ask(self, file: WantedFile, progress: _Progress) -> None:
        count = await self._learn(file)
        while progress.asked < count:
            while self._blobs.pending_pieces > WINDOW_PIECES // 2:
                self._blobs.eased.clear()
                await self._blobs.eased.wait()
            room = min(WINDOW_PIECES, count - progress.asked)
            records = await self._records(file, progress.asked, room)
            pieces = [
                _piece(file, index, chunk) for index, chunk in enumerate(records, progress.asked)
            ]
            places: dict[bytes, int] = {}
            for piece in pieces:
                places.setdefault(piece.sha256, piece.place)
            await self._blobs.want(places, {piece.sha256: piece.size_bytes for piece in pieces})
            progress.advance(len(pieces), done=progress.asked + len(pieces) == count)

    async def _learn(self, file: WantedFile) -> int:
        """Return the count of pieces, once the chunk list is here and found to be right."""
        place = place_of(file.request_id, file.entry)
        data = await read_blob(self._blobs, Blob(file.sha256, place, ANY_SIZE, file.path))
        return await self._blobs.store.run_reading(_count, bytes(data), file.size_bytes)

    async def _records(self, file: WantedFile, first: int, count: int) -> list[Chunk]:
        return await self._blobs.store.run_reading(self._records_sync, file.sha256, first, count)

    def _records_sync(self, sha256: bytes, first: int, count: int) -> list[Chunk]:
        data = self._blobs.store.read_part_sync(sha256, first * RECORD_BYTES, count * RECORD_BYTES)
        return decode_records(data)

    def _task_failed(self, _name: str, _error: BaseException) -> None:
        error = InternalError("the node could not get a large file of the build context")
        for progress in self._files.values():
            progress.fail(error)


def _count(data: bytes, size_bytes: int) -> int:
    return len(decode_chunks(data, size_bytes))


def _piece(file: WantedFile, index: int, chunk: Chunk) -> Blob:
    place = place_of(file.request_id, file.entry, index)
    return Blob(chunk.sha256, place, chunk.size_bytes, file.path)


class _Progress:
    """How far the pieces of one file were looked for and asked for."""

    __slots__ = ("_error", "_news", "asked", "done")

    def __init__(self) -> None:
        self.asked = 0
        self.done = False
        self._error: OffloadError | None = None
        self._news = asyncio.Event()

    def advance(self, count: int, *, done: bool) -> None:
        self.asked += count
        self.done = done
        self._news.set()

    def fail(self, error: OffloadError) -> None:
        if not self.done:
            self._error = self._error or error
            self._news.set()

    async def beyond(self, index: int) -> None:
        """Wait until the piece `index` was asked for."""
        while self.asked <= index:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
