"""How the stat index packs what it knows of the files of one directory.

A row has columns of numbers, then digests, then names, so that a directory is compared with it
column by column.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_COUNTS = struct.Struct("<III")
_NUMBER_TYPES = "qqqQ"
_NUMBER_BYTES = 8
_DIGEST_BYTES = 32
_ATTRIBUTE = struct.Struct("<IHI")
_DECODED_FILES = 4096
"""So many at once, to bound memory."""
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
        """Take a row that `FileTable` made; none for a directory that nothing is known of.

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

    def files(self) -> Iterator[tuple[str, IndexedFile]]:
        """Yield everything, with the names, in their order."""
        for first in range(0, len(self._names), _DECODED_FILES):
            end = min(first + _DECODED_FILES, len(self._names))
            rows = zip(*self._columns(first, end), self._digests(first, end), strict=True)
            for name, row in zip(self._names[first:end], rows, strict=True):
                yield name, IndexedFile._make((*row, self.xattrs.get(name)))

    def __len__(self) -> int:
        return len(self._names)

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


class FileTable:
    """The making of a row; few bytes per file, as a directory can have very many."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._numbers = tuple(array(kind) for kind in _NUMBER_TYPES)
        self._digests = bytearray()
        self._xattrs: dict[str, Mapping[str, bytes]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, name: str, file: IndexedFile) -> None:
        """Append a file whose name was not added yet."""
        self._places[name] = len(self._places)
        identity = (file.size_bytes, file.mtime_ns, file.ctime_ns, file.inode)
        for numbers, number in zip(self._numbers, identity, strict=True):
            numbers.append(number)
        self._digests += file.sha256
        if file.xattrs:
            self._xattrs[name] = file.xattrs

    def pack(self) -> bytes:
        """Return the row."""
        ordered = sorted(self._places)
        places = [self._places[name] for name in ordered]
        names = os.fsencode("\0".join(ordered))
        columns = [
            struct.pack(f"<{len(places)}{numbers.typecode}", *map(numbers.__getitem__, places))
            for numbers in self._numbers
        ]
        digests = bytearray()
        for place in places:
            digests += self._digests[place * _DIGEST_BYTES : (place + 1) * _DIGEST_BYTES]
        attributes = [
            _ATTRIBUTE.pack(number, len(encoded), len(value)) + encoded + value
            for number, name in enumerate(ordered)
            if name in self._xattrs
            for encoded, value in _encoded(self._xattrs[name])
        ]
        head = _COUNTS.pack(len(places), len(names), len(attributes))
        return b"".join([head, *columns, digests, names, *attributes])


def _encoded(xattrs: Mapping[str, bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((os.fsencode(name), value) for name, value in xattrs.items())
