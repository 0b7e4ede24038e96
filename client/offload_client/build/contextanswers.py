"""What the node asks about local sources: their listings, pages of these, and content."""

from __future__ import annotations

import asyncio
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
    from offload_client.context.listing import ClientListing
    from offload_proto.v1.node_service_pb2 import ContextRequest, NeedBlobs, NeedPages

ANNOUNCE_SECONDS = 0.02
"""New pages are announced this often while a scan runs."""
PAGES_PER_MESSAGE = 1024
"""Their names have 32 KiB."""
PAGE_LEVEL = 3
SMALL_PAGE_BYTES = 256
"""Not worth compressing."""
WRONG_PAGE = "the node asked for a page that the listing of the build context does not have"


class ContextAnswers:
    """The listings of one build at one node."""

    def __init__(
        self,
        scans: ContextScans,
        say: Callable[[RunRequest], Awaitable[None]],
        uploader: Uploader,
        step: SendingStep,
    ) -> None:
        """Know no listing yet.

        Args:
            scans: the sources.
            say: sends a message on the control stream; waits while too many are on their way.
            uploader: sends content.
            step: shows what is sent.
        """
        self._scans = scans
        self._say = say
        self._uploader = uploader
        self._step = step
        self._listings: dict[int, ClientListing] = {}
        # The node uses pages in their order.
        self._sending_pages = asyncio.Lock()
        self._compress = compressor(PAGE_LEVEL)

    async def send_listing(self, request: ContextRequest) -> None:
        """Scan a source and name its pages while that goes on; say why when it cannot be done."""
        scan: ContextScan | None = None
        try:
            scan = self._scans.start(request)
            self._listings[request.request_id] = scan.listing
            self._uploader.offer(request.request_id, scan.source, scan.listing)
            await self._announce(request.request_id, scan)
        except OffloadError as error:
            failure = ContextFailure(
                request_id=request.request_id,
                message=error.message,
                changed=isinstance(error, ContextChangedError),
            )
            await self._say(RunRequest(context_failure=failure))
        finally:
            if scan is not None:
                scan.stop()

    async def _announce(self, request_id: int, scan: ContextScan) -> None:
        self._step.scanning()
        pages, announced, last = scan.listing.pages, 0, False
        while not last:
            await asyncio.wait((scan.done,), timeout=ANNOUNCE_SECONDS)
            over = scan.done.done()
            if over:
                scan.done.result()
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
        listing = self._listings.get(need.request_id)
        known = 0 if listing is None else len(listing.pages)
        if listing is None or max((*need.pages, *need.times), default=-1) >= known:
            failure = ContextFailure(request_id=need.request_id, message=WRONG_PAGE)
            await self._say(RunRequest(context_failure=failure))
            return
        only_times = set(need.times).difference(need.pages)
        async with self._sending_pages:
            for number in sorted(only_times.union(need.pages)):
                page = ContextPage(request_id=need.request_id, page=number)
                listed = listing.pages[number]
                page.modified_at_deltas_ns.extend(deltas(listed.times))
                if number not in only_times:
                    page.data, page.zstd = self._packed(listed.data)
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
