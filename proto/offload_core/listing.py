"""Listings of build contexts in pages: what both sides must agree on.

A listing is cut into pages where the paths say so and nothing else. A change of content changes
the digest of one page, a new or removed file that of one or two, so what is known of the others
need not travel again: the listing is itself transferred by content.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from offload_core.errors import UsageError
from offload_core.filemode import is_regular
from offload_proto.v1.node_service_pb2 import (
    EntryAttribute,
    EntryDevice,
    EntryLink,
    ListingPage,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHA256_BYTES = 32
MIN_PAGE_ENTRIES = 32
MAX_PAGE_ENTRIES = 1024
_CUT_MASK = 0x7F
"""A page ends, on average, 128 entries after its minimum."""
MAX_PAGE_BYTES = 8 << 20
"""Serialised; 1,024 entries with paths of the greatest length and room for attributes."""


def begins_page(path: str, entries_before: int) -> bool:
    """Return whether an entry begins a page.

    Args:
        path: of the entry.
        entries_before: entries that the page before it has so far.
    """
    if entries_before < MIN_PAGE_ENTRIES:
        return False
    return entries_before >= MAX_PAGE_ENTRIES or not zlib.crc32(path.encode()) & _CUT_MASK


def next_page(paths: Sequence[str], start: int, entries_before: int) -> int:
    """Return the number of the first path from `start` on that begins a page, as `begins_page`.

    Args:
        paths: of entries that follow each other.
        start: number of the first to look at.
        entries_before: entries that the page before it has so far.

    Returns:
        `len(paths)` when none of them begins one.
    """
    first = start + max(0, MIN_PAGE_ENTRIES - entries_before)
    end = min(len(paths), start + MAX_PAGE_ENTRIES - entries_before)
    crc32 = zlib.crc32
    for number in range(first, end):
        if not crc32(paths[number].encode()) & _CUT_MASK:
            return number
    return end


@dataclass(slots=True)
class Page:
    """A run of entries, column by column.

    Attributes:
        paths: relative, clean, with "/" as separator.
        modes: Go's os.FileMode encoding.
        sizes_bytes: of regular files, else 0.
        digests: 32 bytes for each entry with content, in order; see `has_content`.
        links: target of a symbolic link or first path of a hard link, by number of the entry.
        xattrs: extended attributes by number of the entry.
        devices: major and minor number by number of the entry.
    """

    paths: Sequence[str]
    modes: Sequence[int]
    sizes_bytes: Sequence[int]
    digests: bytes
    links: Mapping[int, str] = field(default_factory=dict)
    xattrs: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict)
    devices: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def has_content(self, entry: int) -> bool:
        """Return whether an entry is a regular file that is not empty and no hard link."""
        return (
            self.sizes_bytes[entry] > 0
            and is_regular(self.modes[entry])
            and entry not in self.links
        )

    def digest_list(self) -> list[bytes]:
        """Return the digest of each entry; b"" where there is no content."""
        counts = accumulate(map(self.has_content, range(len(self))), initial=0)
        positions = list(counts)
        return [
            self.digests[SHA256_BYTES * start : SHA256_BYTES * end]
            for start, end in pairwise(positions)
        ]


def encode_page(page: Page) -> bytes:
    """Return the bytes whose SHA-256 names the page.

    Raises:
        UnicodeEncodeError: a path is not UTF-8.
    """
    message = ListingPage(
        paths="\0".join(page.paths).encode(),
        modes=page.modes,
        sizes_bytes=page.sizes_bytes,
        digests=page.digests,
        links=[EntryLink(entry=entry, target=page.links[entry]) for entry in sorted(page.links)],
        attributes=[
            EntryAttribute(entry=entry, name=name, value=page.xattrs[entry][name])
            for entry in sorted(page.xattrs)
            for name in sorted(page.xattrs[entry])
        ],
        devices=[
            EntryDevice(entry=entry, major=major, minor=minor)
            for entry, (major, minor) in sorted(page.devices.items())
        ],
    )
    return message.SerializeToString(deterministic=True)


def decode_page(data: bytes) -> Page:
    """Return the entries of a page; its columns fit together.

    Says nothing about paths and their order.

    Raises:
        UsageError: it is no page.
    """
    try:
        message = ListingPage.FromString(data)
        if message.paths.count(b"\0") >= MAX_PAGE_ENTRIES or not _fits(message):
            # Before lists are made of it: a page may claim millions of entries.
            raise _malformed()
        paths = message.paths.decode().split("\0")
    except (DecodeError, UnicodeDecodeError) as error:
        raise _malformed() from error
    count = len(paths)
    page = Page(
        paths,
        list(message.modes),
        list(message.sizes_bytes),
        message.digests,
        {link.entry: link.target for link in message.links},
        _attributes(message),
        {device.entry: (device.major, device.minor) for device in message.devices},
    )
    numbers = (*page.links, *page.xattrs, *page.devices)
    if (
        len(page.modes) != count
        or len(page.sizes_bytes) != count
        or (numbers and max(numbers) >= count)
        or sum(map(page.has_content, range(count))) * SHA256_BYTES != len(page.digests)
    ):
        raise _malformed()
    return page


def _fits(message: ListingPage) -> bool:
    columns = (message.modes, message.sizes_bytes, message.links, message.devices)
    return max(map(len, columns)) <= MAX_PAGE_ENTRIES


def _attributes(message: ListingPage) -> Mapping[int, Mapping[str, bytes]]:
    found: dict[int, dict[str, bytes]] = {}
    for attribute in message.attributes:
        found.setdefault(attribute.entry, {})[attribute.name] = attribute.value
    return found


def _malformed() -> UsageError:
    return UsageError("the client sent a damaged listing of the build context")


def deltas(times_ns: Sequence[int]) -> list[int]:
    """Return times as differences to the one before, the first to 0."""
    return [time - before for before, time in zip((0, *times_ns), times_ns, strict=False)]


def from_deltas(differences: Sequence[int]) -> list[int]:
    """Return the times; the inverse of `deltas`."""
    return list(accumulate(differences))
