"""The answer to one context request while it arrives: names of pages, and the pages asked for.

Nothing is verified here but sizes and that it was asked for; `node.entries` does the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from offload_core.errors import ContextChangedError, ContextError, OffloadError, UsageError
from offload_core.listing import MAX_PAGE_BYTES, MIN_PAGE_ENTRIES, SHA256_BYTES, from_deltas
from offload_proto.v1.node_service_pb2 import NeedPages, RunResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from offload_proto.v1.node_service_pb2 import ContextFailure, ContextListing, ContextPage

    Send = Callable[[RunResponse], Awaitable[None]]
    Fail = Callable[[OffloadError], None]
    Expect = Callable[[Fail], AbstractContextManager[None]]

MAX_ENTRIES = 2_000_000
MAX_PAGES = MAX_ENTRIES // MIN_PAGE_ENTRIES + 1
MAX_LISTING_BYTES = 512 << 20
"""Bytes of all pages that are sent for one listing, unpacked: 2,000,000 entries of 250 bytes."""
MAX_WAITING_BYTES = 64 << 20
"""Bytes of pages, as sent, that have come and were not looked at yet."""
PAGES_IN_FLIGHT = 256
"""Pages that are asked for and not looked at yet: some 2 MB, 40,000 entries a round trip."""
_FIRST_PAGES_IN_FLIGHT = 32
"""Until the size of a page is known."""


def too_large() -> UsageError:
    """Return the error for a listing beyond the limits."""
    return UsageError(
        f"the build context is too large: at most {MAX_ENTRIES} files and directories are taken; "
        "exclude what is not needed in .dockerignore"
    )


class ArrivedPage(NamedTuple):
    """A page as it came; not verified.

    Attributes:
        data: serialised, perhaps compressed; empty when only the times were asked for.
        zstd: it is compressed.
        times_ns: modification time of each entry.
    """

    data: bytes
    zstd: bool
    times_ns: list[int]


class ListingFeed:
    """One listing on its way from the client; close it when it is not needed any more.

    One task may read the announcements and one the pages.
    """

    def __init__(
        self, request_id: int, send: Send, expect: Expect, request: RunResponse | None = None
    ) -> None:
        """Prepare a listing that the client was asked for with `request`."""
        self.request_id = request_id
        self._request = request or RunResponse()
        self._names = bytearray()
        """Digests of all pages that were announced."""
        self._again: int | None = None
        """While a client that came back lists once more: the bytes of `_names` that it said."""
        self._repeated = False
        self.on_close: Callable[[], object] = lambda: None
        self._send = send
        self._expect = expect
        self._error: OffloadError | None = None
        self._announced: deque[list[bytes]] = deque()
        self._page_count = 0
        self._ended = False
        self._asked: dict[int, bool] = {}
        """By page, whether its data was asked for and not only its times."""
        self._arrived: dict[int, ArrivedPage] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._largest = 0
        self._news = asyncio.Event()

    def close(self) -> None:
        """Take nothing more; what still comes is ignored."""
        self.fail(ContextError("the listing of the build context was given up"))
        self._arrived.clear()
        self._announced.clear()
        self.on_close()

    def fail(self, error: OffloadError) -> None:
        """End whoever waits, now and later; the first error holds."""
        self._error = self._error or error
        self._news.set()

    def repeat(self) -> tuple[RunResponse, RunResponse | None]:
        """Return what a client that takes the place of another is asked: the listing, and pages.

        It must list what the former one has listed.
        """
        self._again, self._repeated = 0, True
        missing = sorted(set(self._asked) - set(self._arrived))
        if not missing:
            return self._request, None
        return self._request, self._needed([(number, self._asked[number]) for number in missing])

    def _needed(self, asked: Sequence[tuple[int, bool]]) -> RunResponse:
        return RunResponse(
            need_pages=NeedPages(
                request_id=self.request_id,
                pages=[number for number, data in asked if data],
                times=[number for number, data in asked if not data],
            )
        )

    async def announced(self) -> list[bytes]:
        """Return the names of the next pages, waiting for some; [] after the last one.

        Raises:
            ContextError: the client cannot read it, or does not answer.
        """
        await self._wait(lambda: bool(self._announced) or self._ended)
        found: list[bytes] = []
        while self._announced:
            found += self._announced.popleft()
        return found

    async def need(self, pages: Sequence[int], times: Sequence[int]) -> None:
        """Ask for pages, and for times only of others; waits while too many are under way."""
        todo = sorted([*((number, True) for number in pages), *((n, False) for n in times)])
        while todo:
            await self._wait(lambda: len(self._asked) < self._window)
            room = self._window - len(self._asked)
            now, todo = todo[:room], todo[room:]
            self._asked.update(now)
            await self._send(self._needed(now))

    async def page(self, number: int) -> ArrivedPage:
        """Return a page that was or will be asked for, once, waiting for it.

        Raises:
            ContextError: the client cannot read it, or does not answer.
        """
        await self._wait(lambda: number in self._arrived)
        page = self._arrived.pop(number)
        self._waiting_bytes -= len(page.data)
        del self._asked[number]
        self._news.set()
        return page

    def ready(self, number: int) -> bool:
        """Return whether `page` does not wait."""
        return number in self._arrived

    def arrived_bytes(self, number: int) -> int:
        """Return the unpacked size of a page that is `ready`."""
        page = self._arrived[number]
        return unpacked_size(page.data, zstd=page.zstd) if page.data else 0

    @property
    def _window(self) -> int:
        if not self._largest:
            return _FIRST_PAGES_IN_FLIGHT
        return max(4, min(PAGES_IN_FLIGHT, MAX_WAITING_BYTES // 2 // self._largest))

    async def _wait(self, fulfilled: Callable[[], bool]) -> None:
        while not fulfilled():
            if self._error is not None:
                raise self._error
            with self._expecting():
                self._news.clear()
                await self._news.wait()
        if self._error is not None:
            raise self._error

    @contextmanager
    def _expecting(self) -> Iterator[None]:
        # While pages that came are not looked at, it is not the client that is waited for.
        if self._ended and len(self._arrived) == len(self._asked):
            yield
        else:
            with self._expect(self.fail):
                yield

    # What the link calls.

    def take_listing(self, message: ContextListing) -> None:
        """Take names of pages.

        Raises:
            UsageError: too many, or malformed.
        """
        data = message.pages
        if len(data) % SHA256_BYTES:
            raise UsageError("the client sent a damaged listing of the build context")
        if self._again is not None:
            data = self._compare(data, self._again, last=message.last)
            if self._ended:
                return
        if self._ended:
            raise UsageError("the client sent more of a build context that it had ended")
        self._page_count += len(data) // SHA256_BYTES
        if self._page_count > MAX_PAGES:
            raise too_large()
        self._names += data
        if data:
            self._announced.append(
                [data[at : at + SHA256_BYTES] for at in range(0, len(data), SHA256_BYTES)]
            )
        self._ended = message.last
        self._news.set()

    def _compare(self, data: bytes, offset: int, *, last: bool) -> bytes:
        """Return what is new in a listing that was begun before.

        Raises:
            ContextChangedError: it is not the one that was begun.
        """
        end, known = offset + len(data), len(self._names)
        before = max(0, known - offset)
        same = bytes(self._names[offset:end]) == data[:before]
        if not same or (last and end < known) or (self._ended and end > known):
            raise ContextChangedError(
                "the build context changed while its client was away; build again"
            )
        self._again = None if last else end
        return data[before:]

    def take_page(self, message: ContextPage) -> None:
        """Take a page, or its times.

        Raises:
            UsageError: unasked, too large, or malformed.
        """
        number, data = message.page, message.data
        if self._repeated and (number not in self._asked or number in self._arrived):
            return  # it was asked for twice, of two clients
        if number not in self._asked or number in self._arrived:
            raise UsageError("the client sent a page of the build context that was not asked for")
        if bool(data) != self._asked[number]:
            raise UsageError("the client sent a damaged listing of the build context")
        size = unpacked_size(data, zstd=message.zstd) if data else 0
        self._largest = max(self._largest, len(data), 1)
        self._total_bytes += size
        self._waiting_bytes += len(data)
        if self._total_bytes > MAX_LISTING_BYTES or self._waiting_bytes > MAX_WAITING_BYTES:
            raise too_large()
        self._arrived[number] = ArrivedPage(
            data, message.zstd, from_deltas(message.modified_at_deltas_ns)
        )
        self._news.set()

    def take_failure(self, message: ContextFailure) -> None:
        """Take the news that the local source cannot be read."""
        cls = ContextChangedError if message.changed else ContextError
        self.fail(cls(message.message))


def unpacked_size(data: bytes, *, zstd: bool) -> int:
    """Return the size of a page before it is unpacked.

    Raises:
        UsageError: it is too large, or does not say.
    """
    try:
        size = zstandard.frame_content_size(data) if zstd else len(data)
    except zstandard.ZstdError:
        size = -1
    if size < 0:
        raise UsageError("the client sent a damaged listing of the build context")
    if size > MAX_PAGE_BYTES:
        raise UsageError(
            f"the client sent a page of the build context of {size} bytes; "
            f"at most {MAX_PAGE_BYTES} are taken"
        )
    return size
