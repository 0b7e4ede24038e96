"""Remembers the digests of files, so that an unchanged tree is not read again.

One SQLite file serves all contexts of a user. A row holds one directory of one root: its files
with size, mtime, ctime, inode and digest, packed, because 50,000 rows cost more time than the
files that they describe.

A remembered digest is used only when size, mtime, ctime and inode are as they were, and when both
times were older than the reading of the file by more than `GRANULARITY_NS`: a file that is
written twice within one tick of the clock looks the same after both writes (the "racy" problem of
git's index). The ctime cannot be set by programs, so a restored mtime hides nothing.

The index only saves time. When it is locked, damaged or cannot be written, it is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
import zlib
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

GRANULARITY_NS = 2_000_000_000
"""Coarsest time stamps in use are FAT's 2 s; it also covers a file server's clock that differs."""
FORMAT_VERSION = 1
KEEP_DAYS = 30
"""Directories that no scan has asked for so long are forgotten."""
_TOUCH_DAYS = 7
_LOCK_POLL_SECONDS = 0.005
_LOCK_WAIT_SECONDS = 1.0
_DAY_SECONDS = 86_400

_COUNTS = struct.Struct("<III")
_RECORD = struct.Struct("<qqqQq32s")
_ATTRIBUTE = struct.Struct("<IHI")


class IndexedFile(NamedTuple):
    """What is known about one file.

    Attributes:
        size_bytes: st_size.
        mtime_ns: st_mtime_ns.
        ctime_ns: st_ctime_ns.
        inode: st_ino.
        recorded_at_ns: when reading began, in nanoseconds since 1970 UTC.
        sha256: 32 bytes.
        xattrs: extended attributes that are sent; None for none.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    recorded_at_ns: int
    sha256: bytes
    xattrs: Mapping[str, bytes] | None = None

    def describes(self, status: os.stat_result) -> bool:
        """Return whether the digest is certainly that of the file with this status."""
        return (
            self.size_bytes == status.st_size
            and self.mtime_ns == status.st_mtime_ns
            and self.ctime_ns == status.st_ctime_ns
            and self.inode == status.st_ino
            and max(self.mtime_ns, self.ctime_ns) < self.recorded_at_ns - GRANULARITY_NS
        )


class StatIndex:
    """The part of the index that belongs to one root; for one thread at a time.

    Nothing is opened before the first `directory`. Several processes may use the file at once;
    the last to save a directory wins, which costs at most a repeated reading.
    """

    def __init__(self, path: Path, root: Path) -> None:
        """Prepare an index.

        Args:
            path: the SQLite file, made with its directories when missing.
            root: root of the build context.
        """
        self._path = path
        self._root = hashlib.sha256(os.fsencode(os.path.realpath(root))).digest()[:16]
        self._connection: sqlite3.Connection | None = None
        self._packed: dict[bytes, tuple[int, int, bytes]] | None = None
        self._used: set[bytes] = set()
        self._changed: dict[bytes, bytes] = {}
        self.problem = ""
        """Why the index is out of use; empty while it works."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save and close; harmless when done twice."""
        self.save()
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None
        self._packed = None

    def directory(self, path: str) -> dict[str, IndexedFile]:
        """Return what is known about the files of a directory, "" for the root, by name.

        Rows can be out of date: ask `IndexedFile.describes`.
        """
        if self._packed is None:
            self._packed = self._load()
        key = os.fsencode(path)
        row = self._packed.get(key)
        if row is None:
            return {}
        self._used.add(key)
        _, checksum, data = row
        if zlib.crc32(data) != checksum:
            return {}
        try:
            return _unpack(data)
        except (struct.error, ValueError, IndexError):
            return {}

    def remember(self, path: str, files: Mapping[str, IndexedFile]) -> None:
        """Replace what is known about a directory; written by `save`."""
        self._changed[os.fsencode(path)] = _pack(files)

    def save(self) -> None:
        """Write what was remembered since the last time."""
        if self._packed is None or self._connection is None:
            return
        import sqlite3

        today = _today()
        changed, self._changed = self._changed, {}
        touched = [
            key
            for key in self._used - changed.keys()
            if key in self._packed and self._packed[key][0] < today - _TOUCH_DAYS
        ]
        self._used.clear()
        if not changed and not touched:
            return
        rows = [(self._root, key, today, zlib.crc32(data), data) for key, data in changed.items()]
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "INSERT OR REPLACE INTO directories VALUES (?, ?, ?, ?, ?)", rows
                )
                if touched:
                    self._connection.executemany(
                        "UPDATE directories SET used_on = ? WHERE root = ? AND path = ?",
                        [(today, self._root, key) for key in touched],
                    )
                self._connection.execute(
                    "DELETE FROM directories WHERE used_on < ?", (today - KEEP_DAYS,)
                )
        except sqlite3.Error as error:
            self._fail(error)
            return
        self._packed.update({row[1]: (row[2], row[3], row[4]) for row in rows})

    def _load(self) -> dict[bytes, tuple[int, int, bytes]]:
        import sqlite3

        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = self._open()
            rows = self._connection.execute(
                "SELECT path, used_on, checksum, data FROM directories WHERE root = ?",
                (self._root,),
            )
            return {path: (used_on, checksum, data) for path, used_on, checksum, data in rows}
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
            return {}

    def _open(self) -> sqlite3.Connection:
        import sqlite3

        # The owner keeps to one thread at a time, but not always to the same one.
        connection = sqlite3.connect(
            self._path,
            timeout=_LOCK_WAIT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        # Kept even when the next line fails, so that `close` finds it.
        self._connection = connection
        self._use_wal(connection)
        # A power cut may lose or damage the file; the checksums then tell, and files are read.
        connection.execute("PRAGMA synchronous = OFF")
        if _version(connection) != FORMAT_VERSION:
            with contextlib.suppress(OSError):
                self._path.chmod(0o600)
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                if _version(connection) == FORMAT_VERSION:
                    # Another process was faster.
                    return connection
                connection.execute("DROP TABLE IF EXISTS directories")
                connection.execute(
                    "CREATE TABLE directories (root BLOB NOT NULL, path BLOB NOT NULL, "
                    "used_on INTEGER NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL, "
                    "PRIMARY KEY (root, path))"
                )
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        return connection

    @staticmethod
    def _use_wal(connection: sqlite3.Connection) -> None:
        """Switch the journal; SQLite does not wait here while another process switches it too."""
        import sqlite3

        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_POLL_SECONDS)

    def _fail(self, error: Exception) -> None:
        import sqlite3

        self.problem = str(error)
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
            error, sqlite3.OperationalError | sqlite3.ProgrammingError
        )
        if damaged:
            # The next scan starts a new file; a process that has the old one open keeps it.
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    self._path.with_name(self._path.name + suffix).unlink()


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _today() -> int:
    return int(time.time()) // _DAY_SECONDS


def _pack(files: Mapping[str, IndexedFile]) -> bytes:
    names = b"\0".join(map(os.fsencode, files))
    records = b"".join(_RECORD.pack(*file[:6]) for file in files.values())
    attributes = bytearray()
    count = 0
    for position, file in enumerate(files.values()):
        for name, value in (file.xattrs or {}).items():
            encoded = os.fsencode(name)
            attributes += _ATTRIBUTE.pack(position, len(encoded), len(value)) + encoded + value
            count += 1
    return _COUNTS.pack(len(files), len(names), count) + records + names + bytes(attributes)


def _unpack(data: bytes) -> dict[str, IndexedFile]:
    files, names_length, attributes = _COUNTS.unpack_from(data)
    if not files:
        return {}
    start = _COUNTS.size
    end = start + files * _RECORD.size
    records = _RECORD.iter_unpack(memoryview(data)[start:end])
    at = end + names_length
    names = os.fsdecode(data[end:at]).split("\0")
    if len(names) != files:
        raise ValueError("names and records differ in number")
    unpacked = dict(zip(names, map(IndexedFile._make, _with_no_xattrs(records)), strict=True))
    for _ in range(attributes):
        position, name_length, value_length = _ATTRIBUTE.unpack_from(data, at)
        at += _ATTRIBUTE.size
        name = os.fsdecode(data[at : at + name_length])
        at += name_length
        file = unpacked[names[position]]
        xattrs = {**(file.xattrs or {}), name: data[at : at + value_length]}
        unpacked[names[position]] = file._replace(xattrs=xattrs)
        at += value_length
    return unpacked


def _with_no_xattrs(records: Iterator[tuple[int, ...]]) -> Iterator[tuple[object, ...]]:
    for record in records:
        yield (*record, None)
