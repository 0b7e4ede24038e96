"""What BuildKit is told of a listing, page by page: the rules of sticky times.

- A page that BuildKit was told of before is told as it was.
- An entry of a new page keeps its time when path and content are those of before.
- Changed content gets the client's time, but at least one nanosecond more than was told before.
- A new path gets the client's time, unless an earlier listing had it: then the rules above hold.
- A hard link has the time of the file that it leads to, because on the disk they are one.

Content is the digest, the target of a link and the extended attributes. Modes and sizes are not:
BuildKit compares them itself.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from offload_builder.buildkit.statframes import read_frames, stat_frames
from offload_builder.node.entries import (
    ListingEnd,
    check_joint,
    check_times,
    read_page,
    tree_key,
)
from offload_builder.node.listingfeed import MAX_ENTRIES, too_large
from offload_builder.node.toldtables import CONTENT_BYTES, FormerListing, Removed, ToldPage
from offload_core.errors import UsageError
from offload_core.filemode import is_regular
from offload_core.listing import SHA256_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_builder.buildkit.statframes import ToldEntry
    from offload_builder.node.stickytimes import StickyTimes
    from offload_builder.node.toldtables import ListingKey
    from offload_core.listing import Page

_NO_CONTENT = bytes(CONTENT_BYTES)
_OPEN_PAGES = 8
"""Pages whose entries are kept unpacked; overlapping ones are neighbours."""


class _Known(NamedTuple):
    """An entry as it was told; `number` in its page."""

    content: bytes
    modified_at_ns: int
    linked: bool
    number: int


class NewPage(NamedTuple):
    """A page whose entries must be looked at.

    Attributes:
        digest: its name.
        data: serialised; was verified.
        times_ns: the client's; None for a page that was told before.
    """

    digest: bytes
    data: bytes
    times_ns: list[int] | None


class Telling:
    """One listing on its way to BuildKit; blocking, used from one thread at a time.

    Args:
        times: the memory; None for a listing that BuildKit is not told of.
        key: names the listing in the memory.
    """

    def __init__(self, times: StickyTimes | None, key: ListingKey) -> None:
        self._times = times
        self._key = key
        self._former = FormerListing(0, [], 0)
        self._former_firsts: list[str] = []
        self._former_numbers: dict[bytes, int] = {}
        self._former_open: OrderedDict[int, dict[str, _Known]] = OrderedDict()
        self._matched: dict[int, set[int]] = {}
        """Entries of former pages that are in new pages."""
        self._pages: list[ToldPage] = []
        self._firsts: list[str] = []
        self._open: OrderedDict[int, dict[str, ToldEntry]] = OrderedDict()
        self._end = ListingEnd()
        self._entries = 0
        self._changed: dict[bytes, ToldPage] = {}
        self._removed: dict[bytes, Removed] = {}
        self._back: set[bytes] = set()
        self._begun = False
        self._compressor = zstandard.ZstdCompressor(level=1)

    def open(self) -> None:
        """Recall what was told before.

        Raises:
            NodeLostError: the memory cannot be used.
        """
        if self._times is None:
            return
        self._former = self._times.load(self._key)
        self._former_firsts = [tree_key(page.first) for page in self._former.pages]
        self._former_numbers = {
            page.digest: number for number, page in enumerate(self._former.pages)
        }

    @property
    def begun(self) -> bool:
        """Whether something new is told, which BuildKit must take to its end."""
        return self._begun

    def told_before(self, digest: bytes) -> bool:
        """Return whether the times of a page are known."""
        return digest in self._former_numbers

    def needs_data(self, digest: bytes) -> bool:
        """Return whether the entries of a page must be looked at."""
        number = self._former_numbers.get(digest)
        return number is None or self._former.pages[number].linked

    def take(self, pages: Sequence[bytes | NewPage]) -> list[ToldPage]:
        """Decide what is told of the next pages.

        Args:
            pages: the name of a page for which `needs_data` is false, else its data.

        Raises:
            UsageError: no honest client lists this.
            QuotaExceededError: the disk is full, so nothing new can be told.
        """
        told = [
            self._take_known(page) if isinstance(page, bytes) else self._take_new(page)
            for page in pages
        ]
        if self._changed:
            self._begin()
        return told

    def finish(self) -> None:
        """Remember the listing; only then its end may be told.

        Raises:
            QuotaExceededError: the disk is full.
        """
        if self._times is None:
            return
        self._note_removed()
        order = [page.digest for page in self._pages]
        if not self._changed and order == [page.digest for page in self._former.pages]:
            return
        self._begin()
        self._times.commit(
            self._key, self._pages, self._changed.values(), self._removed, self._back
        )
        self._changed.clear()
        self._former_open.clear()

    def _begin(self) -> None:
        if not self._begun and self._times is not None:
            self._times.begin(self._key)
            self._begun = True

    def _take_known(self, digest: bytes) -> ToldPage:
        page = self._former.pages[self._former_numbers[digest]]
        check_joint(page.first, self._end)
        self._append(page, ListingEnd(page.last, page.directory))
        return page

    def _take_new(self, new: NewPage) -> ToldPage:
        page, end = read_page(new.data, self._end)
        count = len(page)
        times = [0] * count if new.times_ns is None else check_times(new.times_ns, count)
        contents = _contents(page)
        links = [number for number in sorted(page.links) if is_regular(page.modes[number])]
        if self._former.pages or self._former.removed:
            times = self._stick(page, times, contents, links)
        page_sizes = list(page.sizes_bytes)
        for number in links:
            times[number], page_sizes[number] = self._target(page, number, times)
        page.sizes_bytes = page_sizes
        sizes = [size for number, size in enumerate(page.sizes_bytes) if page.has_content(number)]
        told = ToldPage(
            digest=new.digest,
            first=page.paths[0],
            last=page.paths[-1],
            directory=end.directory,
            entries=count,
            files=len(sizes),
            size_bytes=sum(sizes),
            linked=bool(links),
            frames=self._compressor.compress(stat_frames(page, times)),
            contents=b"".join(contents),
        )
        before = self._former_numbers.get(new.digest)
        if before is None or self._former.pages[before].frames != told.frames:
            self._changed[new.digest] = told
        # What commit needs is kept in `_changed` until then.
        told = told._replace(contents=b"")
        self._append(told, end)
        return told

    def _append(self, page: ToldPage, end: ListingEnd) -> None:
        self._pages.append(page)
        self._firsts.append(tree_key(page.first))
        self._end = end
        self._entries += page.entries
        if self._entries > MAX_ENTRIES:
            raise too_large()

    # Times.

    def _stick(
        self, page: Page, times: list[int], contents: list[bytes], links: Sequence[int]
    ) -> list[int]:
        """Return the times of entries that are no hard links."""
        known = self._known_entries(page)
        linked = set(links)
        found = list(times)
        new: dict[bytes, int] = {}
        for number, path in enumerate(page.paths):
            before = known.get(path)
            if number in linked:
                if before is not None and not before.linked:
                    # The time of a link may be earlier; what the path was must not be forgotten.
                    self._removed[path_name(path)] = Removed(before.content, before.modified_at_ns)
            elif before is None or before.linked:
                new[path_name(path)] = number
            elif before.content == contents[number]:
                found[number] = before.modified_at_ns
            else:
                found[number] = max(times[number], before.modified_at_ns + 1)
        if new and self._former.removed and self._times is not None:
            for name, was in self._times.removed(self._former.id, list(new)).items():
                number = new[name]
                self._back.add(name)
                if was.content == contents[number] and page.paths[number] not in known:
                    found[number] = was.modified_at_ns
                else:
                    found[number] = max(times[number], was.modified_at_ns + 1)
        for number in new.values():
            if (before := known.get(page.paths[number])) is not None:
                found[number] = max(found[number], before.modified_at_ns + 1)
        return found

    def _known_entries(self, page: Page) -> dict[str, _Known]:
        """Return the entries of the former pages that overlap with a page, and mark its own."""
        first, last = tree_key(page.paths[0]), tree_key(page.paths[-1])
        start = max(0, bisect_right(self._former_firsts, first) - 1)
        end = bisect_right(self._former_firsts, last)
        known: dict[str, _Known] = {}
        for number in range(start, end):
            entries = self._former_entries(number)
            common = entries.keys() & set(page.paths)
            if common:
                self._matched.setdefault(number, set()).update(
                    entries[path].number for path in common
                )
                known.update((path, entries[path]) for path in common)
        return known

    def _former_entries(self, number: int) -> dict[str, _Known]:
        entries = self._former_open.get(number)
        if entries is None and self._times is not None:
            page = self._former.pages[number]
            contents = self._times.contents(self._former.id, page.digest)
            entries = {
                entry.path: _Known(
                    contents[CONTENT_BYTES * place : CONTENT_BYTES * (place + 1)],
                    entry.modified_at_ns,
                    bool(entry.link) and is_regular(entry.mode),
                    place,
                )
                for place, entry in enumerate(told_entries(page))
            }
            self._former_open[number] = entries
            if len(self._former_open) > _OPEN_PAGES:
                self._former_open.popitem(last=False)
        return entries or {}

    def _note_removed(self) -> None:
        """Remember the paths that BuildKit was told of and that are not listed any more."""
        told = {page.digest for page in self._pages}
        for number, page in enumerate(self._former.pages):
            matched = self._matched.get(number, set())
            if page.digest in told or len(matched) == page.entries:
                continue
            for path, entry in self._former_entries(number).items():
                if entry.number not in matched:
                    self._removed[path_name(path)] = Removed(entry.content, entry.modified_at_ns)

    # Hard links.

    def _target(self, page: Page, number: int, times: Sequence[int]) -> tuple[int, int]:
        """Return time and size of the file that a hard link leads to.

        BuildKit compares both with those of the link, which on its disk is the same file; where
        they differ it makes the link anew, over itself, and leaves a temporary name behind.
        """
        target = page.links[number]
        place = _place(page, target)
        if place is None:
            told = self._told(target)
            if told is not None and is_regular(told.mode) and not told.link:
                return told.modified_at_ns, told.size_bytes
        elif place < number and is_regular(page.modes[place]) and place not in page.links:
            return times[place], page.sizes_bytes[place]
        raise UsageError(
            f"the client listed {page.paths[number][:200]!r} of the build context as a hard link "
            f"to {target[:200]!r}, which is no file listed before it"
        )

    def _told(self, path: str) -> ToldEntry | None:
        """Return an entry of the pages before."""
        number = bisect_right(self._firsts, tree_key(path)) - 1
        if number < 0:
            return None
        entries = self._open.get(number)
        if entries is None:
            entries = {entry.path: entry for entry in told_entries(self._pages[number])}
            self._open[number] = entries
            if len(self._open) > _OPEN_PAGES:
                self._open.popitem(last=False)
        return entries.get(path)


def told_entries(page: ToldPage) -> list[ToldEntry]:
    """Return the entries of a page as BuildKit was told of them."""
    return read_frames(zstandard.ZstdDecompressor().decompress(page.frames))


def path_name(path: str) -> bytes:
    """Return what stands for a path where many are remembered."""
    return hashlib.blake2b(path.encode(), digest_size=CONTENT_BYTES).digest()


def _place(page: Page, path: str) -> int | None:
    place = bisect_left(page.paths, tree_key(path), key=tree_key)
    return place if place < len(page) and page.paths[place] == path else None


def _contents(page: Page) -> list[bytes]:
    """Return `CONTENT_BYTES` for each entry that change when its content does."""
    contents: list[bytes] = []
    digests, position = page.digests, 0
    links, xattrs = page.links, page.xattrs
    for number, (mode, size) in enumerate(zip(page.modes, page.sizes_bytes, strict=True)):
        if size and is_regular(mode) and number not in links:
            content = digests[position : position + CONTENT_BYTES]
            position += SHA256_BYTES
        else:
            content = _NO_CONTENT
        if number in links or number in xattrs:
            content = _special_content(content, links.get(number, ""), xattrs.get(number, {}))
        contents.append(content)
    return contents


def _special_content(content: bytes, link: str, xattrs: Mapping[str, bytes]) -> bytes:
    hashed = hashlib.blake2b(content, digest_size=CONTENT_BYTES)
    hashed.update(link.encode() + b"\0")
    for name in sorted(xattrs):
        value = xattrs[name]
        hashed.update(b"%b\0%d\0%b" % (name.encode(), len(value), value))
    return hashed.digest()
