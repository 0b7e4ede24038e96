"""How the stat index packs what it knows of the files of one directory.

A row has columns of numbers, then digests, then names, so that a directory is compared with it
column by column.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_COUNTS = struct.Struct("<III")
_NUMBER_TYPES = "qqqQ"
_NUMBER_BYTES = 8
_DIGEST_BYTES = 32
_ATTRIBUTE = struct.Struct("<IHI")
_EMPTY_ROW = _COUNTS.pack(0, 0, 0)


class IndexedFile(NamedTuple):
    """What is known about one file.

    Attributes:
        size_bytes: st_size.
        mtime_ns: st_mtime_ns.
        ctime_ns: st_ctime_ns.
        inode: st_ino.
        sha256: 32 bytes; of the chunk list for a large file.
        xattrs: extended attributes that are sent; None for none.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: bytes
    xattrs: Mapping[str, bytes] | None = None


class KnownFiles:
    """One row, decoded as far as it is asked for."""

    def __init__(self, data: bytes = _EMPTY_ROW) -> None:
        """Take a row that `pack_files` made; none for a directory that nothing is known of.

        Raises:
            ValueError: it is damaged.
            struct.error: likewise.
        """
        self._data = data
        self._names: list[str] = []
        self.xattrs: Mapping[str, Mapping[str, bytes]] = {}
        """Extended attributes by name of the file, of those files that have some."""
        count, names_bytes, attributes = _COUNTS.unpack_from(data)
        self._digests_at = _COUNTS.size + len(_NUMBER_TYPES) * _NUMBER_BYTES * count
        at = self._digests_at + _DIGEST_BYTES * count
        if count:
            self._names = os.fsdecode(data[at : at + names_bytes]).split("\0")
        if len(self._names) != count:
            raise ValueError("names and files differ in number")
        if attributes:
            self.xattrs = self._attributes(at + names_bytes, attributes)

    def digests(
        self, names: Sequence[str], statuses: Sequence[os.stat_result]
    ) -> list[bytes | None]:
        """Return the digest of each file; None where it is not known for this status.

        Args:
            names: of files in the directory, sorted.
            statuses: of the same files.
        """
        if not self._names or not names:
            return [None] * len(names)
        first, end = bisect_left(self._names, names[0]), bisect_right(self._names, names[-1])
        asked = (
            tuple([status.st_size for status in statuses]),
            tuple([status.st_mtime_ns for status in statuses]),
            tuple([status.st_ctime_ns for status in statuses]),
            tuple([status.st_ino for status in statuses]),
        )
        columns = self._columns(first, end)
        digests = self._digests(first, end)
        if self._names[first:end] == names and columns == asked:
            # Nothing has changed, as nearly always. This takes a third of the time of the rest.
            return list(digests)
        identities = zip(self._names[first:end], *columns, strict=True)
        known = dict(zip(identities, digests, strict=True))
        return list(map(known.get, zip(names, *asked, strict=True)))

    def files(self) -> dict[str, IndexedFile]:
        """Return everything, by name."""
        end = len(self._names)
        rows = zip(*self._columns(0, end), self._digests(0, end), strict=True)
        return {
            name: IndexedFile._make((*row, self.xattrs.get(name)))
            for name, row in zip(self._names, rows, strict=True)
        }

    def _columns(self, first: int, end: int) -> tuple[tuple[int, ...], ...]:
        return tuple(self._numbers(column, first, end) for column in range(len(_NUMBER_TYPES)))

    def _numbers(self, column: int, first: int, end: int) -> tuple[int, ...]:
        start = _COUNTS.size + (column * len(self._names) + first) * _NUMBER_BYTES
        return struct.unpack_from(f"<{end - first}{_NUMBER_TYPES[column]}", self._data, start)

    def _digests(self, first: int, end: int) -> list[bytes]:
        start = self._digests_at + first * _DIGEST_BYTES
        stop = self._digests_at + end * _DIGEST_BYTES
        data = self._data
        return [data[at : at + _DIGEST_BYTES] for at in range(start, stop, _DIGEST_BYTES)]

    def _attributes(self, at: int, count: int) -> Mapping[str, Mapping[str, bytes]]:
        found: dict[str, dict[str, bytes]] = {}
        for _ in range(count):
            file, name_bytes, value_bytes = _ATTRIBUTE.unpack_from(self._data, at)
            value_at = at + _ATTRIBUTE.size + name_bytes
            name = os.fsdecode(self._data[at + _ATTRIBUTE.size : value_at])
            at = value_at + value_bytes
            found.setdefault(self._names[file], {})[name] = self._data[value_at:at]
        return found


def pack_files(files: Mapping[str, IndexedFile]) -> bytes:
    """Return the row of a directory."""
    ordered = sorted(files.items())
    count = len(ordered)
    names = b"\0".join(os.fsencode(name) for name, _ in ordered)
    columns = [
        struct.pack(f"<{count}{kind}", *(file[column] for _, file in ordered))
        for column, kind in enumerate(_NUMBER_TYPES)
    ]
    digests = b"".join(file.sha256 for _, file in ordered)
    attributes = [
        _ATTRIBUTE.pack(number, len(encoded), len(value)) + encoded + value
        for number, (_, file) in enumerate(ordered)
        for encoded, value in _encoded(file.xattrs)
    ]
    head = _COUNTS.pack(count, len(names), len(attributes))
    return b"".join([head, *columns, digests, names, *attributes])


def _encoded(xattrs: Mapping[str, bytes] | None) -> Iterable[tuple[bytes, bytes]]:
    return ((os.fsencode(name), value) for name, value in (xattrs or {}).items())
