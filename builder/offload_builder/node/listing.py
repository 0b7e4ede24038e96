"""One listing of a local source: from the client's announcements to what BuildKit is told.

Pages are decided on in their order, as soon as all before them are, while the client still scans.
What is kept of a page is small: the packed STAT packets that BuildKit is told.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import structlog

from offload_builder.node.entries import unpack_page
from offload_builder.node.telling import NewPage, told_entries
from offload_core.aio import TaskSet
from offload_core.errors import ContextError, InternalError, OffloadError, UsageError
from offload_core.listing import MAX_PAGE_BYTES, decode_page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from offload_builder.buildkit.statframes import ToldEntry
    from offload_builder.node.listingfeed import ArrivedPage, ListingFeed
    from offload_builder.node.pagestore import PageStore
    from offload_builder.node.stickytimes import StickyTimes
    from offload_builder.node.telling import Telling
    from offload_builder.node.toldtables import ListingKey, ToldPage
    from offload_proto.v1.builds_service_pb2 import BuildStats

log = structlog.get_logger(__name__)

PAGES_PER_TURN = 32
_OPEN_PAGES = 4
"""Pages whose entries are kept unpacked; BuildKit asks in the order of the listing."""


class _Slot(NamedTuple):
    """A page that was announced."""

    digest: bytes
    stored: bool
    asked: bool
    """The client was asked for it, or for its times."""


class _Input(NamedTuple):
    """What there is of a page before it is decided on."""

    digest: bytes
    data: bytes | None
    arrived: ArrivedPage | None


class Listing:
    """One listing; starts with `start` and ends with `close`.

    Attributes:
        request_id: of the client's answer.
        users: transfers that are reading it.
    """

    def __init__(
        self,
        feed: ListingFeed,
        store: PageStore,
        times: StickyTimes,
        telling: Telling,
        key: ListingKey,
        turn: asyncio.Lock,
        stats: BuildStats,
    ) -> None:
        """Prepare a listing.

        Args:
            feed: what the client answers; closed with this.
            store: of pages.
            times: the memory, and the thread for work on pages.
            telling: decides what is told.
            key: names the listing in the memory.
            turn: held while something is told that the memory does not say yet.
            stats: files and bytes are counted here.
        """
        self.request_id = feed.request_id
        self.users = 0
        self._feed = feed
        self._store = store
        self._times = times
        self._telling = telling
        self._key = key
        self._turn = turn
        self._stats = stats
        self._tasks = TaskSet()
        self._work: asyncio.Task[None] | None = None
        self._slots: list[_Slot] = []
        self._announced_all = False
        self._slot_news = asyncio.Event()
        self._pages: list[ToldPage] = []
        self._offsets: list[int] = []
        self._count = 0
        self._complete = False
        self._error: OffloadError | None = None
        self._news = asyncio.Event()
        self._settled = False
        self._open: dict[int, list[ToldEntry]] = {}
        self._open_digests: dict[int, list[bytes]] = {}
        self.on_refused: Callable[[OffloadError], None] = lambda _: None
        """Called with the error when the client listed what no honest client lists."""

    def start(self) -> None:
        """Begin to take the client's answer."""
        self._work = self._tasks.start(self._run(), name="listing")

    @property
    def complete(self) -> bool:
        """Whether every page was decided on and is remembered."""
        return self._complete

    @property
    def name(self) -> str:
        """Name of the local source."""
        return self._key.name

    @property
    def page_digests(self) -> list[bytes]:
        """Digests of the pages that BuildKit was told of, in order."""
        return [page.digest for page in self._pages]

    @property
    def failed(self) -> bool:
        """Whether the listing cannot be read to its end."""
        return self._error is not None

    async def close(self) -> None:
        """End the work; what BuildKit was told and has not taken to its end is forgotten."""
        if not self._complete:
            self._fail(ContextError("the listing of the build context was given up"))
        await self._tasks.close()
        self._feed.close()
        if not self._settled:
            self._settled = True
            await self._times.run(self._forget_sync)

    def _forget_sync(self) -> None:
        # In the thread: what was going on there when it was cancelled has ended.
        if self._telling.begun:
            self._times.retire(self._key.shared_key)

    async def delivered(self) -> None:
        """Hear that BuildKit has all of it."""
        if self._telling.begun and not self._settled:
            self._settled = True
            try:
                await self._times.run(self._times.settle, self._key)
            except OffloadError as error:
                # Harmless: the next build gets another generation.
                log.warning("times.settle.failed", reason=error.message)

    # Reading.

    async def pages(self) -> AsyncIterator[Sequence[ToldPage]]:
        """Yield the pages as they are decided on, as many as there are at a time.

        Raises:
            OffloadError: the listing cannot be read.
        """
        number = 0
        while True:
            if number < len(self._pages):
                pages = self._pages[number:]
                number += len(pages)
                yield pages
            elif self._error is not None:
                raise self._error
            elif self._complete:
                return
            else:
                self._news.clear()
                await self._news.wait()

    @property
    def count(self) -> int:
        """Entries so far."""
        return self._count

    def entry(self, index: int) -> ToldEntry:
        """Return an entry by its number, which is below `count`."""
        number = bisect_right(self._offsets, index) - 1
        return self._entries(number)[index - self._offsets[number]]

    def index_of(self, path: str) -> int | None:
        """Return the number of an entry by its path; None when there is none so far."""
        key = path.replace("/", "\0")
        number = bisect_right(self._pages, key, key=lambda page: page.first.replace("/", "\0")) - 1
        if number < 0:
            return None
        for place, entry in enumerate(self._entries(number)):
            if entry.path == path:
                return self._offsets[number] + place
        return None

    async def digests(self, indexes: Sequence[int]) -> list[bytes]:
        """Return the digest of each of these entries; b"" where there is no content.

        Raises:
            OffloadError: a page has gone and the client cannot be asked for it again.
        """
        found: list[bytes] = []
        for index in indexes:
            number = bisect_right(self._offsets, index) - 1
            digests = self._open_digests.get(number) or await self._load_digests(number)
            found.append(digests[index - self._offsets[number]])
        return found

    def _entries(self, number: int) -> list[ToldEntry]:
        entries = self._open.get(number)
        if entries is None:
            entries = told_entries(self._pages[number])
            if len(self._open) >= _OPEN_PAGES:
                del self._open[next(iter(self._open))]
            self._open[number] = entries
        return entries

    async def _load_digests(self, number: int) -> list[bytes]:
        name = self._pages[number].digest
        data = (await self._store.load([name])).get(name)
        if data is None:
            data = await self._fetch_again(number, name)
        digests = decode_page(data).digest_list()
        if len(self._open_digests) >= _OPEN_PAGES:
            del self._open_digests[next(iter(self._open_digests))]
        self._open_digests[number] = digests
        return digests

    async def _fetch_again(self, number: int, name: bytes) -> bytes:
        await self._feed.need([number], [])
        data = await self._times.run(unpack_page, await self._feed.page(number), name)
        await self._store.keep([(name, data)])
        return data

    # Taking the client's answer.

    async def _run(self) -> None:
        try:
            async with self._turn:
                await self._times.run(self._telling.open)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._classify())
                    group.create_task(self._decide())
        except OffloadError as error:
            self._fail(error)
        except BaseExceptionGroup as errors:
            self._fail(_first(errors))
        finally:
            if not self._complete:
                self._fail(ContextError("the listing of the build context was given up"))

    def _fail(self, error: OffloadError) -> None:
        if self._error is None and isinstance(error, UsageError):
            self.on_refused(error)
        self._error = self._error or error
        self._news.set()

    async def _classify(self) -> None:
        """Find out which pages are known, and ask for the others."""
        while digests := await self._feed.announced():
            stored = await self._store.find(digests)
            pages, times = [], []
            for number, digest in enumerate(digests, len(self._slots)):
                if digest not in stored:
                    pages.append(number)
                elif not self._telling.told_before(digest):
                    times.append(number)
            asked = {*pages, *times}
            self._slots += [
                _Slot(digest, digest in stored, number in asked)
                for number, digest in enumerate(digests, len(self._slots))
            ]
            self._slot_news.set()
            await self._feed.need(pages, times)
        self._announced_all = True
        self._slot_news.set()

    async def _decide(self) -> None:
        while batch := await self._next_batch():
            told, new = await self._times.run(self._take_sync, await self._read(batch))
            if new:
                await self._store.keep(new)
            for page in told:
                self._pages.append(page)
                self._offsets.append(self._count)
                self._count += page.entries
                self._stats.context_files += page.files
                self._stats.context_bytes += page.size_bytes
            self._news.set()
        await self._times.run(self._telling.finish)
        self._complete = True
        self._news.set()

    async def _next_batch(self) -> list[int]:
        """Return the numbers of the next pages that are there, or of the one to wait for."""
        while (start := len(self._pages)) == len(self._slots):
            if self._announced_all:
                return []
            self._slot_news.clear()
            await self._slot_news.wait()
        end, size = start + 1, 0
        while end < min(len(self._slots), start + PAGES_PER_TURN) and size < MAX_PAGE_BYTES:
            if self._slots[end].asked:
                if not self._feed.ready(end):
                    break
                size += self._feed.arrived_bytes(end)
            end += 1
        return list(range(start, end))

    async def _read(self, batch: Sequence[int]) -> list[_Input]:
        """Return what there is to decide on; fewer pages when they are very large."""
        slots = [(number, self._slots[number]) for number in batch]
        wanted = [s.digest for _, s in slots if s.stored and self._telling.needs_data(s.digest)]
        stored = await self._store.load(wanted) if wanted else {}
        inputs: list[_Input] = []
        for number, slot in slots:
            needed = self._telling.needs_data(slot.digest)
            if needed and slot.stored and slot.digest not in stored and inputs:
                break  # It was too much for once, or it has gone; the next turn tells.
            arrived = await self._feed.page(number) if slot.asked else None
            data = stored.get(slot.digest)
            if needed and data is None and (arrived is None or not arrived.data):
                data = await self._fetch_again(number, slot.digest)
            inputs.append(_Input(slot.digest, data, arrived))
        return inputs

    def _take_sync(
        self, inputs: Sequence[_Input]
    ) -> tuple[list[ToldPage], list[tuple[bytes, bytes]]]:
        """Return what is told, and the pages that came from the client."""
        taken: list[bytes | NewPage] = []
        new: list[tuple[bytes, bytes]] = []
        for digest, stored, arrived in inputs:
            data = stored
            if arrived is not None and arrived.data:
                data = unpack_page(arrived, digest)
                new.append((digest, data))
            if data is None or not self._telling.needs_data(digest):
                taken.append(digest)
            elif arrived is None or self._telling.told_before(digest):
                taken.append(NewPage(digest, data, None))
            else:
                taken.append(NewPage(digest, data, arrived.times_ns))
        return self._telling.take(taken), new


def _first(errors: BaseExceptionGroup[BaseException]) -> OffloadError:
    leaf: BaseException = errors
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    if isinstance(leaf, OffloadError):
        return leaf
    error = InternalError("the node failed to read the listing of the build context")
    error.__cause__ = leaf
    return error
