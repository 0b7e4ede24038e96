"""The listing of one local source of a build, in pages that are named by their digest.

It grows in the thread that scans and is read by others meanwhile. Pages stay serialised, which
takes about 100 bytes per file.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from offload_client.context.entries import FileRun, TreeEntry
from offload_client.context.source import ListedContent
from offload_core.errors import ContextError, UsageError
from offload_core.filemode import is_regular
from offload_core.listing import (
    MAX_PAGE_BYTES,
    SHA256_BYTES,
    Page,
    begins_page,
    decode_page,
    encode_page,
    next_page,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.context.entries import ContextItem

_DECODED_PAGES = 16


class ListedPage(NamedTuple):
    """A page that is complete.

    Attributes:
        digest: SHA-256 of `data`, the page's name.
        data: the serialised page, see `offload_core.listing`.
        times: modification time of each entry in nanoseconds since 1970 UTC.
    """

    digest: bytes
    data: bytes
    times: array[int]


class _DecodedPage(NamedTuple):
    first: int
    paths: list[str]
    sizes: list[int]
    digests: list[bytes]
    times: array[int]


class ClientListing:
    """Pages of entries; one thread adds, any thread reads what is complete.

    Attributes:
        pages: complete ones, in order.
        entries: number of entries in them.
        files: regular files so far, hard links included.
        total_bytes: their content.
    """

    def __init__(self) -> None:
        self.pages: list[ListedPage] = []
        self.entries = 0
        self.files = 0
        self.total_bytes = 0
        self._firsts = array("Q")
        self._begin_page()
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, _DecodedPage] = OrderedDict()
        self._latest = _DecodedPage(0, [], [], [], array("q"))

    def add(self, item: ContextItem) -> None:
        """Append what a source yielded next.

        Raises:
            ContextError: the extended attributes in one page are too large.
        """
        if isinstance(item, FileRun):
            self._add_run(item)
        else:
            self._add_entry(item)

    def finish(self) -> None:
        """Complete the last page; a listing without entries has none.

        Raises:
            ContextError: as `add`.
        """
        if self._paths:
            self._complete_page()

    def content(self, entry: int) -> ListedContent:
        """Return what is to be read for an entry.

        Args:
            entry: its number in the listing, from 0.

        Raises:
            IndexError: no complete page has it.
            UsageError: it has no content: it is empty, or no regular file.
        """
        page = self._latest
        number = entry - page.first
        if not 0 <= number < len(page.paths):
            page = self._decoded_page(entry)
            number = entry - page.first
        digest = page.digests[number]
        if not digest:
            raise UsageError(f'"{page.paths[number]}" of the build context has no content')
        return ListedContent(page.paths[number], page.sizes[number], digest, page.times[number])

    def _begin_page(self) -> None:
        self._paths: list[str] = []
        self._modes: list[int] = []
        self._sizes = array("Q")
        self._digests = bytearray()
        self._times = array("q")
        self._links: dict[int, str] = {}
        self._xattrs: dict[int, Mapping[str, bytes]] = {}
        self._devices: dict[int, tuple[int, int]] = {}

    def _complete_page(self) -> None:
        data = encode_page(
            Page(
                self._paths,
                self._modes,
                self._sizes,
                bytes(self._digests),
                self._links,
                self._xattrs,
                self._devices,
            )
        )
        if len(data) > MAX_PAGE_BYTES:
            raise ContextError(
                f'the extended attributes of "{self._paths[0]}" and its neighbours in the build '
                f"context are too large: {len(data)} bytes, at most {MAX_PAGE_BYTES} can be sent",
                hint="remove them, or list the files in .dockerignore",
            )
        self._firsts.append(self.entries)
        self.pages.append(ListedPage(hashlib.sha256(data).digest(), data, self._times))
        # Last, as it is what tells other threads that the page can be read.
        self.entries += len(self._times)
        self._begin_page()

    def _add_entry(self, entry: TreeEntry) -> None:
        if begins_page(entry.path, len(self._paths)):
            self._complete_page()
        number = len(self._paths)
        self._paths.append(entry.path)
        self._modes.append(entry.mode)
        self._sizes.append(entry.size_bytes)
        self._times.append(entry.modified_at_ns)
        if entry.link_name:
            self._links[number] = entry.link_name
        if entry.xattrs:
            self._xattrs[number] = entry.xattrs
        if entry.device_major or entry.device_minor:
            self._devices[number] = entry.device_major, entry.device_minor
        if is_regular(entry.mode):
            self.files += 1
            self.total_bytes += entry.size_bytes
            if entry.sha256 is not None and entry.size_bytes:
                self._digests += entry.sha256

    def _add_run(self, run: FileRun) -> None:
        prefix = run.prefix
        paths = [prefix + name for name in run.names]
        start = 0
        while start < len(paths):
            stop = next_page(paths, start, len(self._paths))
            if stop == start:
                self._complete_page()
                continue
            self._paths += paths[start:stop]
            self._modes += run.modes[start:stop]
            sizes = run.sizes_bytes[start:stop]
            self._sizes += sizes
            self._times += run.modified_at_ns[start:stop]
            digests = run.sha256[SHA256_BYTES * start : SHA256_BYTES * stop]
            if 0 in sizes:
                # Nothing is asked for an empty file.
                digests = b"".join(
                    digests[SHA256_BYTES * number : SHA256_BYTES * number + SHA256_BYTES]
                    for number, size in enumerate(sizes)
                    if size
                )
            self._digests += digests
            start = stop
        self.files += len(paths)
        self.total_bytes += sum(run.sizes_bytes)

    def _decoded_page(self, entry: int) -> _DecodedPage:
        with self._lock:
            if not 0 <= entry < self.entries:
                raise IndexError(f"the listing has no entry {entry}")
            number = bisect_right(self._firsts, entry) - 1
            found = self._decoded.pop(number, None)
            if found is None:
                listed = self.pages[number]
                page = decode_page(listed.data)
                found = _DecodedPage(
                    self._firsts[number],
                    list(page.paths),
                    list(page.sizes_bytes),
                    page.digest_list(),
                    listed.times,
                )
                if len(self._decoded) >= _DECODED_PAGES:
                    self._decoded.popitem(last=False)
            self._decoded[number] = self._latest = found
            return found
