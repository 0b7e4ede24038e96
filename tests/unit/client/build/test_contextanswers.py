"""Listings and pages as a client answers them: named while it scans, sent when asked for."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import zstandard

from offload_client.build.contextanswers import ContextAnswers
from offload_client.build.contextscan import ContextScans
from offload_client.build.sendingstep import SendingStep
from offload_client.build.upload import Uploader
from offload_client.context.entries import TreeEntry
from offload_client.context.source import DirectorySource
from offload_client.progress.display import make_display
from offload_core.errors import ContextChangedError, ContextError
from offload_core.filemode import go_file_mode
from offload_core.listing import MIN_PAGE_ENTRIES, decode_page, from_deltas
from offload_proto.v1.node_service_pb2 import ContextRequest, NeedPages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from grpc import aio

    from offload_client.context.source import ContentReader, ContextSource, Selection
    from offload_proto.v1.node_service_pb2 import ContextPage, RunRequest

FILE_MODE = go_file_mode(0o100644)


class Numbers:
    """A source of as many empty files as a test wants, at its pace."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = count
        self.error = error
        self.gates: dict[int, threading.Event] = {}
        self.scanning = 0
        self.most_at_once = 0
        self.closed = 0
        self.selections: list[Selection] = []

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[TreeEntry]:
        self.selections.append(selection)
        warn("something is left out")
        return self._entries()

    def _entries(self) -> Iterator[TreeEntry]:
        self.scanning += 1
        self.most_at_once = max(self.most_at_once, self.scanning)
        try:
            for number in range(self.count):
                if number in self.gates:
                    self.gates[number].wait(20)
                yield TreeEntry(f"{number:09}", FILE_MODE, 0, number * 1000)
            if self.error is not None:
                raise self.error
        finally:
            self.scanning -= 1
            self.closed += 1

    def open(self) -> ContentReader:
        raise ContextError("nothing to read")


class Asked:
    """The answering side with what it said."""

    def __init__(self, answers: ContextAnswers, said: asyncio.Queue[RunRequest]) -> None:
        self.answers = answers
        self.said = said
        self.warnings: list[str] = []

    def scan(self, request_id: int = 1, name: str = "context") -> asyncio.Task[None]:
        request = ContextRequest(request_id=request_id, local_name=name)
        return asyncio.create_task(self.answers.send_listing(request))

    async def next(self) -> RunRequest:
        async with asyncio.timeout(20):
            return await self.said.get()

    async def names(self, request_id: int = 1) -> list[bytes]:
        """Return the names of all pages of a listing."""
        names = b""
        while True:
            listing = (await self.next()).context_listing
            assert listing.request_id == request_id
            names += listing.pages
            if listing.last:
                return [names[at : at + 32] for at in range(0, len(names), 32)]

    async def pages(self, pages: list[int], times: list[int]) -> list[ContextPage]:
        """Ask for pages and return them."""
        need = NeedPages(request_id=1, pages=pages, times=times)
        sending = asyncio.create_task(self.answers.send_pages(need))
        found = [(await self.next()).context_page for _ in {*pages, *times}]
        await sending
        assert self.said.empty()
        return found


@asynccontextmanager
async def asking(sources: dict[str, ContextSource], outbox: int = 0) -> AsyncIterator[Asked]:
    said: asyncio.Queue[RunRequest] = asyncio.Queue(outbox)
    step = SendingStep(make_display("quiet", io.BytesIO(), {}))

    def no_channel() -> aio.Channel:
        raise AssertionError

    uploader = Uploader(None, (), said.put, step, no_channel)  # type: ignore[arg-type]
    asked: Asked
    scans = ContextScans(sources, lambda text: asked.warnings.append(text))
    asked = Asked(ContextAnswers(scans, said.put, uploader, step), said)
    yield asked


async def test_pages_are_named_while_the_scan_runs() -> None:
    source = Numbers(40_000)
    source.gates = {20_000: threading.Event()}
    async with asking({"context": source}) as asked:
        scan = asked.scan()
        announced = 0
        while announced < 20_000 // 1024:
            listing = (await asked.next()).context_listing
            announced += len(listing.pages) // 32
            assert not listing.last
        assert not scan.done()
        source.gates[20_000].set()
        rest = await asked.names()
        await scan
        assert announced + len(rest) > 40_000 // 1024
        # A page can be asked for before the scan has ended, here after.
        (page,) = await asked.pages([announced], [])
        assert page.page == announced


async def test_first_page_is_named_soon() -> None:
    source = Numbers(5000)
    source.gates = {1500: threading.Event()}
    async with asking({"context": source}) as asked:
        scan = asked.scan()
        began = time.monotonic()
        assert (await asked.next()).context_listing.pages
        assert time.monotonic() - began < 2
        source.gates[1500].set()
        await asked.names()
        await scan


async def test_pages_come_with_their_times_and_times_alone() -> None:
    async with asking({"context": Numbers(3000)}) as asked:
        scan = asked.scan()
        names = await asked.names()
        await scan
        whole, times, both = await asked.pages([0, 2], [1, 2])
        assert [page.page for page in (whole, times, both)] == [0, 1, 2]
        assert all(page.request_id == 1 for page in (whole, times, both))
        assert times.data == b""
        first = decode_page(zstandard.decompress(whole.data) if whole.zstd else whole.data)
        assert whole.zstd
        assert zstandard.frame_content_size(whole.data) > len(whole.data)
        count = len(first)
        assert count >= MIN_PAGE_ENTRIES
        assert first.paths == [f"{number:09}" for number in range(count)]
        assert from_deltas(whole.modified_at_deltas_ns) == [n * 1000 for n in range(count)]
        assert from_deltas(times.modified_at_deltas_ns)[0] == count * 1000
        assert both.data
        assert len(names) > 3


async def test_empty_source_has_a_listing_without_pages() -> None:
    async with asking({"context": Numbers(0)}) as asked:
        scan = asked.scan()
        assert await asked.names() == []
        await scan


async def test_unknown_source_is_a_failure() -> None:
    async with asking({"context": Numbers(1)}) as asked:
        await asked.scan(7, "oci:nothing")
        failure = (await asked.next()).context_failure
        assert failure.request_id == 7
        assert failure.message == 'there is no build context named "oci:nothing"'
        assert not failure.changed


@pytest.mark.parametrize("changed", [True, False])
async def test_scan_that_fails_says_why(changed: bool) -> None:
    kind = ContextChangedError if changed else ContextError
    async with asking({"context": Numbers(9, kind("the reason"))}) as asked:
        await asked.scan()
        while not (message := await asked.next()).HasField("context_failure"):
            assert not message.context_listing.last
        assert message.context_failure.message == "the reason"
        assert message.context_failure.changed == changed


@pytest.mark.parametrize("number", [4000, 1 << 31])
async def test_page_that_does_not_exist_is_a_failure(number: int) -> None:
    async with asking({"context": Numbers(100)}) as asked:
        scan = asked.scan()
        await asked.names()
        await scan
        await asked.answers.send_pages(NeedPages(request_id=1, times=[number]))
        assert "does not have" in (await asked.next()).context_failure.message
        await asked.answers.send_pages(NeedPages(request_id=5, pages=[0]))
        assert (await asked.next()).context_failure.request_id == 5


async def test_several_sources_are_scanned_one_at_a_time_and_warn_once() -> None:
    one, two = Numbers(3000), Numbers(2000)
    one.gates = {2000: threading.Event()}
    async with asking({"context": one, "oci:two": two}) as asked:
        scans = [asked.scan(1), asked.scan(2, "oci:two")]
        await asyncio.sleep(0.2)
        assert (one.scanning, two.scanning) == (1, 0)
        one.gates[2000].set()
        last = 0
        while last < 2:
            last += (await asked.next()).context_listing.last
        await asyncio.gather(*scans)
        assert two.closed == 1
        assert asked.warnings == ["something is left out"]


async def test_scan_stops_when_the_build_is_over() -> None:
    source = Numbers(10_000_000)
    async with asking({"context": source}) as asked:
        scan = asked.scan()
        await asked.next()
        scan.cancel()
        await asyncio.wait((scan,))
        async with asyncio.timeout(10):
            while not source.closed:
                await asyncio.sleep(0.01)
        assert source.scanning == 0


async def test_full_outbox_holds_announcements_back_and_not_the_loop() -> None:
    async with asking({"context": Numbers(60_000)}, outbox=1) as asked:
        scan = asked.scan()
        longest = 0.0
        for _ in range(50):
            began = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - began)
        assert asked.said.qsize() == 1
        assert not scan.done()
        names = await asked.names()
        await scan
        assert len(names) >= 60_000 // 1024
        assert longest < 0.5


async def test_selection_of_the_node_reaches_the_source(tmp_path: Path) -> None:
    source = Numbers(1)
    async with asking({"context": source}) as asked:
        request = ContextRequest(
            request_id=1, local_name="context", include_patterns=["a"],
            exclude_patterns=["b", "!c"], follow_paths=["d"],
        )  # fmt: skip
        await asked.answers.send_listing(request)
        (selection,) = source.selections
        assert (selection.include, selection.exclude, selection.follow) == (
            ["a"], ["b", "!c"], ["d"],
        )  # fmt: skip


async def test_same_directory_gives_the_same_names(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}").write_text(str(number))
    found = []
    for _ in range(2):
        source = DirectorySource(tmp_path, index_path=None)
        async with asking({"context": source}) as asked:
            scan = asked.scan()
            found.append(await asked.names())
            await scan
    assert found[0] == found[1] != []
