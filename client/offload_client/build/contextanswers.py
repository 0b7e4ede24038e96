"""What the node asks about local sources: their listings, pages of these, and content."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.build.packing import WORTH_RATIO, compressor
from offload_core.errors import ContextChangedError, OffloadError
from offload_core.listing import deltas
from offload_proto.v1.node_service_pb2 import (
    ContextFailure,
    ContextListing,
    ContextPage,
    RunRequest,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_client.build.contextscan import ContextScan, ContextScans
    from offload_client.build.sendingstep import SendingStep
    from offload_client.build.upload import Uploader
    from offload_proto.v1.node_service_pb2 import ContextRequest, NeedBlobs, NeedPages

ANNOUNCE_SECONDS = 0.02
"""New pages are announced this often while a scan runs."""
PAGES_PER_MESSAGE = 1024
"""Their names have 32 KiB."""
PAGE_LEVEL = 3
SMALL_PAGE_BYTES = 256
"""Not worth compressing."""
WRONG_PAGE = "the node asked for a page that the listing of the build context does not have"


@dataclass
class Listed:
    """A scan that was begun for a request of the node."""

    scan: ContextScan
    counted: bool = False
    """Its end is shown."""


class ContextAnswers:
    """The listings of one build at one node, over one connection."""

    def __init__(
        self,
        scans: ContextScans,
        say: Callable[[RunRequest], Awaitable[None]],
        uploader: Uploader,
        step: SendingStep,
        listings: dict[int, Listed] | None = None,
    ) -> None:
        """Know no listing yet, or those that were made over a former connection.

        Args:
            scans: the sources.
            say: sends a message on the control stream; waits while too many are on their way.
            uploader: sends content.
            step: shows what is sent.
            listings: by request; kept and filled, because the node may come back to them.
        """
        self._scans = scans
        self._say = say
        self._uploader = uploader
        self._step = step
        self._kept = listings is not None
        self._listings: dict[int, Listed] = {} if listings is None else listings
        for request_id, listed in self._listings.items():
            uploader.offer(request_id, listed.scan.source, listed.scan.listing)
        # The node uses pages in their order.
        self._sending_pages = asyncio.Lock()
        self._compress = compressor(PAGE_LEVEL)

    async def send_listing(self, request: ContextRequest) -> None:
        """Scan a source and name its pages while that goes on; say why when it cannot be done.

        A request that is repeated after a lost connection gets the listing that it had, from its
        first page on.
        """
        listed: Listed | None = None
        try:
            listed = self._listed(request)
            await self._announce(request.request_id, listed)
        except OffloadError as error:
            failure = ContextFailure(
                request_id=request.request_id,
                message=f"{error.message}; {error.hint}" if error.hint else error.message,
                changed=isinstance(error, ContextChangedError),
            )
            await self._say(RunRequest(context_failure=failure))
        finally:
            if listed is not None and not self._kept:
                listed.scan.stop()

    def _listed(self, request: ContextRequest) -> Listed:
        listed = self._listings.get(request.request_id)
        if listed is None:
            scan = self._scans.start(request)
            listed = self._listings[request.request_id] = Listed(scan)
            self._uploader.offer(request.request_id, scan.source, scan.listing)
            self._step.scanning()
        return listed

    async def _announce(self, request_id: int, listed: Listed) -> None:
        scan = listed.scan
        pages, announced, last = scan.listing.pages, 0, False
        while not last:
            await asyncio.wait((scan.done,), timeout=ANNOUNCE_SECONDS)
            over = scan.done.done()
            if over:
                scan.done.result()
                if not listed.counted:
                    listed.counted = True
                    self._step.listed(scan.listing.files, scan.listing.total_bytes)
            known = len(pages)
            while announced < known or (over and not last):
                end = min(announced + PAGES_PER_MESSAGE, known)
                last = over and end == known
                listing = ContextListing(
                    request_id=request_id,
                    pages=b"".join([page.digest for page in pages[announced:end]]),
                    last=last,
                )
                announced = end
                await self._say(RunRequest(context_listing=listing))

    async def send_pages(self, need: NeedPages) -> None:
        """Send pages, or only their times, as the node asks for them."""
        listed = self._listings.get(need.request_id)
        listing = None if listed is None else listed.scan.listing
        known = 0 if listing is None else len(listing.pages)
        if listing is None or max((*need.pages, *need.times), default=-1) >= known:
            failure = ContextFailure(request_id=need.request_id, message=WRONG_PAGE)
            await self._say(RunRequest(context_failure=failure))
            return
        only_times = set(need.times).difference(need.pages)
        async with self._sending_pages:
            for number in sorted(only_times.union(need.pages)):
                page = ContextPage(request_id=need.request_id, page=number)
                content = listing.pages[number]
                page.modified_at_deltas_ns.extend(deltas(content.times))
                if number not in only_times:
                    page.data, page.zstd = self._packed(content.data)
                await self._say(RunRequest(context_page=page))
                # Compressing thousands of pages must not hold up all else.
                await asyncio.sleep(0)

    def want(self, need: NeedBlobs) -> None:
        """Queue content for sending."""
        chunks = ((wanted.entry, wanted.chunks) for wanted in need.chunks)
        self._uploader.want(need.request_id, need.entries, chunks)

    def _packed(self, data: bytes) -> tuple[bytes, bool]:
        if self._compress is None or len(data) < SMALL_PAGE_BYTES:
            return data, False
        packed = self._compress(data)
        return (packed, True) if len(packed) <= WORTH_RATIO * len(data) else (data, False)
