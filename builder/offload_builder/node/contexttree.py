"""A directory of the client as BuildKit reads it: what is told, and content from the node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zstandard

from offload_builder.buildkit.providers import StatRun
from offload_builder.node.content import WantedFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from offload_builder.node.content import BuildContent
    from offload_builder.node.listing import Listing

RUN_BYTES = 128 << 10
"""STAT packets that are sent together."""


class ContextTree:
    """One reading of a listing; its files are stored, or on their way.

    Args:
        listing: what is read; others may read it at the same time.
        content: the files.
        on_close: awaited when this reading has ended.
    """

    def __init__(
        self,
        listing: Listing,
        content: BuildContent,
        on_close: Callable[[], Awaitable[None]],
    ) -> None:
        self._listing = listing
        self._content = content
        self._on_close = on_close
        self._wanted: dict[int, WantedFile] = {}
        self._closed = False
        listing.users += 1

    async def runs(self) -> AsyncIterator[StatRun]:
        """Yield the entries as they become known.

        Raises:
            OffloadError: the client cannot list the directory, or lists what is not accepted.
        """
        unpacker = zstandard.ZstdDecompressor()
        async for pages in self._listing.pages():
            waiting: list[bytes] = []
            size = count = 0
            for page in pages:
                frames = unpacker.decompress(page.frames)
                waiting.append(frames)
                size += len(frames)
                count += page.entries
                if size >= RUN_BYTES:
                    yield StatRun(b"".join(waiting), count)
                    waiting.clear()
                    size = count = 0
            if waiting:
                yield StatRun(b"".join(waiting), count)

    def content_size(self, index: int) -> int:
        """Return the bytes of a file that can be read; -1 for anything else."""
        if index >= self._listing.count:
            return -1
        wanted = self._wanted.get(index)
        return wanted.size_bytes if wanted else self._listing.entry(index).content_size

    async def requested(self, indexes: Sequence[int]) -> None:
        """Have content brought here that the node lacks.

        Raises:
            OffloadError: the client is gone and something is missing.
        """
        files = []
        digests = await self._listing.digests(indexes)
        for index, digest in zip(indexes, digests, strict=True):
            if digest:
                entry = self._listing.entry(index)
                file = WantedFile(
                    self._listing.request_id, index, entry.path, entry.size_bytes, digest
                )
                self._wanted[index] = file
                files.append(file)
        if files:
            await self._content.request(files)

    def at_hand(self, index: int) -> bytes | memoryview | None:
        """Return the bytes of a small file that was `requested` if they are here, once."""
        file = self._wanted.get(index)
        data = None if file is None else self._content.at_hand(file)
        if data is not None:
            del self._wanted[index]
        return data

    def read(self, index: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the bytes of a file that was `requested`, once, waiting for them to arrive."""
        file = self._wanted.pop(index, None)
        return _nothing() if file is None else self._content.read(file)

    async def delivered(self) -> None:
        """Hear that BuildKit has all of it."""
        await self._listing.delivered()

    async def close(self) -> None:
        """End this reading; safe to call again."""
        if not self._closed:
            self._closed = True
            self._wanted.clear()
            self._listing.users -= 1
            await self._on_close()

    # For readers other than BuildKit's transfer of files.

    async def complete(self) -> None:
        """Wait until all entries are known.

        Raises:
            OffloadError: see `runs`.
        """
        async for _ in self._listing.pages():
            pass

    def index_of(self, path: str) -> int | None:
        """Return the number of an entry; None when it is not listed so far."""
        return self._listing.index_of(path)


async def _nothing() -> AsyncIterator[bytes]:
    none: tuple[bytes, ...] = ()
    for piece in none:
        yield piece
