"""Reading what the node wants ahead of the network: one thread, few batches, little memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

from offload_client.build.demand import WHOLE, Item, append
from offload_client.bytepipe import in_thread
from offload_core.chunklist import decode_chunks, is_chunked, offsets
from offload_core.errors import ContextChangedError, UsageError
from offload_proto.v1.node_service_pb2 import BlobFailure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.build.demand import Demand, Wanted
    from offload_client.context.listing import ClientListing
    from offload_client.context.source import ContentReader, ContextSource, ListedContent
    from offload_core.chunklist import Chunk

BATCH_BYTES = 1 << 20
"""Before compression; one larger blob is a batch of its own. The protocol's bound."""
BATCH_BLOBS = 4096
"""Bounds a message of tiny files, whose digests are larger than they are."""
READ_AHEAD_BYTES = 4 << 20
"""What may wait between disk and network."""
WEIGHED_AT_ONCE = 20_000
"""Sizes looked up before each batch, about 40 ms of work, until all that is wanted is known."""
KEPT_CHUNK_LISTS = 4
NOT_LISTED = "the node asked for a file that is not part of the build context"


class Listed(NamedTuple):
    """A listing that the node may want content of."""

    source: ContextSource
    listing: ClientListing


@dataclass(slots=True)
class Batch:
    """Blobs that travel in one message."""

    parts: list[Wanted] = field(default_factory=list)
    """Which they are, in order."""
    sha256: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    total_bytes: int = 0
    failures: list[BlobFailure] = field(default_factory=list)
    """What cannot be delivered."""
    wanted_bytes: int = 0
    """To be added to the sum of all that is wanted: it has become known with this batch."""

    def fits(self, blob: _Blob) -> bool:
        """Return whether a blob may travel with the others."""
        return not self.sizes or (
            len(self.sizes) < BATCH_BLOBS and self.total_bytes + len(blob.content) <= BATCH_BYTES
        )

    def add(self, blob: _Blob) -> None:
        """Append a blob."""
        append(self.parts, blob.item)
        self.sha256.append(blob.sha256)
        self.sizes.append(len(blob.content))
        self.contents.append(blob.content)
        self.total_bytes += len(blob.content)


class _Blob(NamedTuple):
    item: Item
    sha256: bytes
    content: bytes


class _Pieces(NamedTuple):
    content: ListedContent
    chunks: list[Chunk]
    offsets: list[int]


class ReadAhead:
    """Reads wanted blobs in a daemon thread; a context manager.

    A daemon thread, because a file system that hangs must not hold up the end after Ctrl-C.
    """

    def __init__(self, demand: Demand, listed: Mapping[int, Listed]) -> None:
        """Prepare.

        Args:
            demand: what is wanted; closed at the end.
            listed: by request id; filled before something of it is wanted.
        """
        self._demand = demand
        self._listed = listed
        self._loop = asyncio.get_running_loop()
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._taken = threading.Condition()
        self._ahead_bytes = 0
        self._closed = False
        self._thread: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        reader = _Reader(self._demand, self._listed)
        self._thread = in_thread(lambda: self._read(reader), name="context-reader")
        return self

    def __exit__(self, *_: object) -> None:
        self._demand.close()
        with self._taken:
            self._closed = True
            self._taken.notify()

    async def next(self) -> Batch:
        """Return the next batch.

        Raises:
            ContextError: a source of the build context cannot be opened any more.
        """
        thread = self._thread
        if thread is None:
            raise RuntimeError("not entered")
        getting = asyncio.ensure_future(self._batches.get())
        try:
            await asyncio.wait((getting, thread), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                # It ends before it is told to only with an error.
                thread.result()
            batch = await getting
        finally:
            getting.cancel()
        with self._taken:
            self._ahead_bytes -= batch.total_bytes
            self._taken.notify()
        return batch

    def _read(self, reader: _Reader) -> None:
        with reader:
            while (batch := reader.next_batch()) is not None:
                with self._taken:
                    while (
                        self._ahead_bytes
                        and self._ahead_bytes + batch.total_bytes > READ_AHEAD_BYTES
                        and not self._closed
                    ):
                        self._taken.wait()
                    self._ahead_bytes += batch.total_bytes
                if self._closed:
                    return
                # The loop is gone when the program ends while this thread still reads.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._batches.put_nowait, batch)


class _Reader:
    """The part of the thread: it alone opens files."""

    def __init__(self, demand: Demand, listed: Mapping[int, Listed]) -> None:
        self._demand = demand
        self._listed = listed
        self._stack = ExitStack()
        self._readers: dict[int, ContentReader] = {}
        self._pieces: OrderedDict[tuple[int, int], _Pieces] = OrderedDict()
        self._held: _Blob | None = None
        """Read, but too large for the batch before."""
        self._failed: set[tuple[int, int]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def next_batch(self) -> Batch | None:
        """Return what fits into a message of all that is wanted now; None when it is closed."""
        batch = Batch()
        while not self._demand.closed:
            blob, self._held = self._held, None
            if blob is None:
                blob = self._next_blob(batch)
            if blob is None:
                break
            if not batch.fits(blob):
                self._held = blob
                break
            batch.add(blob)
        if self._demand.closed:
            return None
        for wanted in self._demand.unweighed(WEIGHED_AT_ONCE):
            batch.wanted_bytes += self._weight(wanted)
        return batch

    def _next_blob(self, batch: Batch) -> _Blob | None:
        """Read the next blob that can be read; None when nothing else is wanted now."""
        while True:
            # What is there is sent before anything is waited for.
            wait = not batch.sizes and not batch.failures
            item = self._demand.next(wait=wait)
            if item is None:
                return None
            if (item.request_id, item.entry) in self._failed:
                continue
            try:
                blob, extra_bytes = self._blob(item)
            except (ContextChangedError, UsageError, IndexError) as error:
                self._failed.add((item.request_id, item.entry))
                message = error.message if isinstance(error, ContextChangedError) else NOT_LISTED
                batch.failures.append(
                    BlobFailure(request_id=item.request_id, entry=item.entry, message=message)
                )
                continue
            batch.wanted_bytes += extra_bytes
            return blob

    def _blob(self, item: Item) -> tuple[_Blob, int]:
        """Read a blob; the number is what `_weight` could not know of it."""
        if item.file != WHOLE:
            pieces = self._file_pieces(item.request_id, item.file)
            if item.number >= len(pieces.chunks):
                raise IndexError(item.number)
            chunk = pieces.chunks[item.number]
            offset = pieces.offsets[item.number]
            reader = self._reader(item.request_id)
            content = reader.read_chunk(pieces.content, offset, chunk.size_bytes)
            return _Blob(item, chunk.sha256, content), 0
        listed = self._content(item.request_id, item.number)
        if is_chunked(listed.size_bytes):
            content = self._reader(item.request_id).chunk_list(listed)
            return _Blob(item, listed.sha256, content), len(content)
        content = self._reader(item.request_id).read(listed)
        return _Blob(item, listed.sha256, content), 0

    def _weight(self, wanted: Wanted) -> int:
        """Return the bytes of blobs, without those of chunk lists."""
        total = 0
        for item in wanted.items():
            try:
                if item.file != WHOLE:
                    chunks = self._file_pieces(item.request_id, item.file).chunks
                    total += chunks[item.number].size_bytes
                else:
                    size = self._content(item.request_id, item.number).size_bytes
                    total += 0 if is_chunked(size) else size
            except (ContextChangedError, UsageError, IndexError):
                # It is told when it is read.
                continue
        return total

    def _content(self, request_id: int, entry: int) -> ListedContent:
        listed = self._listed.get(request_id)
        if listed is None:
            raise IndexError(request_id)
        return listed.listing.content(entry)

    def _reader(self, request_id: int) -> ContentReader:
        reader = self._readers.get(request_id)
        if reader is None:
            reader = self._stack.enter_context(self._listed[request_id].source.open())
            self._readers[request_id] = reader
        return reader

    def _file_pieces(self, request_id: int, entry: int) -> _Pieces:
        key = (request_id, entry)
        pieces = self._pieces.get(key)
        if pieces is None:
            content = self._content(request_id, entry)
            if not is_chunked(content.size_bytes):
                raise IndexError(entry)
            data = self._reader(request_id).chunk_list(content)
            chunks = decode_chunks(data, content.size_bytes)
            pieces = self._pieces[key] = _Pieces(content, chunks, offsets(chunks))
            if len(self._pieces) > KEPT_CHUNK_LISTS:
                self._pieces.popitem(last=False)
        else:
            self._pieces.move_to_end(key)
        return pieces
