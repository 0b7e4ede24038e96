"""OCI layouts of the client, read by BuildKit blob by blob from the node's content.

A layout travels as any local source does: the client lists the blobs of one image, the node gets
those that BuildKit asks for and that it lacks. BuildKit reads a blob in many small ranges, one
after the other; the place where one range ends is kept for the next.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

PIECE_BYTES = 1 << 20
KEPT_READERS = 8
"""Blobs that are read at the same time without starting again; BuildKit reads 4."""


class LayoutTree(Protocol):
    """The listing of a layout and its content."""

    async def complete(self) -> None:
        """Wait until all entries are known."""
        ...

    def index_of(self, path: str) -> int | None:
        """Return the number of an entry."""
        ...

    def content_size(self, index: int) -> int:
        """Return the bytes of a file; -1 for anything else."""
        ...

    async def requested(self, indexes: list[int]) -> None:
        """Have content brought here."""
        ...

    def read(self, index: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the bytes of a file that was requested, once."""
        ...

    async def close(self) -> None:
        """End the use of the tree."""
        ...


class NearBlobs(Protocol):
    """Blobs of layouts that the node has anyway."""

    async def size(self, layout: str, digest: str) -> int | None:
        """Return the bytes of a blob, None when it is not here."""
        ...

    def read(self, layout: str, digest: str, offset: int, size: int) -> AsyncGenerator[bytes]:
        """Yield a range of a blob that has a size."""
        ...


class _Place(NamedTuple):
    """Where a range of a blob begins that could be read next."""

    store: str
    digest: str
    offset: int


class ClientLayouts:
    """The layouts of one build, as `LayoutBlobs`; closed by its owner."""

    def __init__(
        self,
        stores: Mapping[str, str],
        open_tree: Callable[[str], Awaitable[LayoutTree]],
        near: NearBlobs | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            stores: local sources by the name that BuildKit uses.
            open_tree: returns the tree of a local source.
            near: what is asked before the client.
        """
        self._stores = stores
        self._near = near
        self._open_tree = open_tree
        self._trees: dict[str, LayoutTree] = {}
        self._opening = asyncio.Lock()
        self._requesting = asyncio.Lock()
        self._readers: OrderedDict[_Place, _BlobReader] = OrderedDict()

    async def size(self, store: str, digest: str) -> int | None:
        """Return the bytes of a blob, None when the layout does not have it.

        Raises:
            OffloadError: the client cannot list the layout.
        """
        if (size := await self._near_size(store, digest)) is not None:
            return size
        found = await self._find(store, digest)
        return None if found is None else found[0].content_size(found[1])

    async def read(
        self, store: str, digest: str, offset: int, size: int
    ) -> AsyncGenerator[bytes | memoryview]:
        """Yield `size` bytes of a blob from `offset` on.

        Raises:
            NotFoundError: the layout does not have it.
            OffloadError: the client cannot deliver it.
        """
        if self._near is not None and await self._near_size(store, digest) is not None:
            async with aclosing(self._near.read(store, digest, offset, size)) as pieces:
                async for data in pieces:
                    yield data
            return
        reader = self._readers.pop(_Place(store, digest, offset), None)
        if reader is None:
            reader = await self._start(store, digest, offset)
        kept = False
        try:
            while size > 0 and (piece := await reader.next(min(size, PIECE_BYTES))):
                offset += len(piece)
                size -= len(piece)
                if size == 0:
                    # BuildKit may end the call as soon as it has the last piece.
                    await self._keep(_Place(store, digest, offset), reader)
                    kept = True
                yield piece
        finally:
            if not kept:
                await reader.close()

    async def close(self) -> None:
        """Give everything back; harmless when done twice."""
        async with AsyncExitStack() as stack:
            while self._trees:
                stack.push_async_callback(self._trees.popitem()[1].close)
            while self._readers:
                stack.push_async_callback(self._readers.popitem()[1].close)

    async def _near_size(self, store: str, digest: str) -> int | None:
        return None if self._near is None else await self._near.size(store, digest)

    async def _start(self, store: str, digest: str, offset: int) -> _BlobReader:
        found = await self._find(store, digest)
        if found is None:
            raise NotFoundError(f"the OCI layout has no blob {digest}")
        tree, index = found
        # A tree hands out what was requested once, so these two belong together.
        async with self._requesting:
            await tree.requested([index])
            pieces = tree.read(index)
        reader = _BlobReader(pieces)
        try:
            await reader.skip(offset)
        except BaseException:
            await reader.close()
            raise
        return reader

    async def _keep(self, place: _Place, reader: _BlobReader) -> None:
        before = self._readers.pop(place, None)
        self._readers[place] = reader
        if before is None and len(self._readers) > KEPT_READERS:
            _, before = self._readers.popitem(last=False)
        if before is not None:
            await before.close()

    async def _find(self, store: str, digest: str) -> tuple[LayoutTree, int] | None:
        tree = await self._tree(store)
        if tree is None:
            return None
        index = tree.index_of("blobs/" + digest.replace(":", "/", 1))
        return None if index is None or tree.content_size(index) < 0 else (tree, index)

    async def _tree(self, store: str) -> LayoutTree | None:
        name = self._stores.get(store)
        if name is None:
            return None
        async with self._opening:
            tree = self._trees.get(store)
            if tree is None:
                tree = await self._open_tree(name)
                try:
                    await tree.complete()
                except BaseException:
                    await tree.close()
                    raise
                self._trees[store] = tree
        return tree


class _BlobReader:
    """A blob that is read from its start to its end, in pieces of any size."""

    def __init__(self, pieces: AsyncIterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    async def next(self, size: int) -> memoryview:
        """Return at most `size` bytes; none at the end."""
        if not self._left:
            self._left = memoryview(await anext(self._pieces, b""))
        piece, self._left = self._left[:size], self._left[size:]
        return piece

    async def skip(self, size: int) -> None:
        while size > 0 and (piece := await self.next(size)):
            size -= len(piece)

    async def close(self) -> None:
        async with aclosing(cast("AsyncGenerator[bytes | memoryview]", self._pieces)):
            self._left = memoryview(b"")
