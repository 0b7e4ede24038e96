"""Small blobs of build contexts, many to a file.

Making a file costs more than writing a source file's bytes: 60 to 270 microseconds on the ext4 of
a busy node, against 3 for appending its bytes to a file that is open. So small blobs are appended
to *segments*; an SQLite table says which blob is where. A segment is removed as a whole.

Nothing is synced: that would wait for all bytes that the disk has yet to write. After a power cut
the table is checked, and given up when it is damaged; it may then still name bytes that were never
written, so the reader verifies what it did not see written; see `contextstore`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

log = structlog.get_logger(__name__)

SMALL_BYTES = 64 << 10
"""Larger blobs have a file of their own."""
SEGMENT_BYTES = 32 << 20
FRESH_BLOBS = 1 << 16
"""Places of the blobs that came last are known without the table: they are read next."""
OPEN_SEGMENTS = 8
TOUCH_SECONDS = 3600.0
"""How stale the mark of a segment's last use may be; a write per use would cost too much."""
_DIGESTS_PER_QUERY = 500
_CHECKPOINT_PAGES = 4000
"""16 MB of the table's changes are written twice instead of each page at each change."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_APPEND = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY AUTOINCREMENT, size_bytes INTEGER NOT NULL, used_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS blobs (
    digest BLOB PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blobs_by_segment ON blobs (segment);
CREATE TABLE IF NOT EXISTS boots (id TEXT PRIMARY KEY);
"""


class Segment(NamedTuple):
    """A file of small blobs."""

    used_at: float
    size_bytes: int
    number: int


class _Place(NamedTuple):
    segment: int
    start: int
    size_bytes: int


class SmallBlobs:
    """Small blobs below one directory.

    `read` may be called in any thread, everything else in one. An OSError or sqlite3.Error is
    the caller's to explain.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writing: sqlite3.Connection
        self._reading: sqlite3.Connection
        self._file = -1
        self._number = 0
        self._size_bytes = 0
        self._damaged: set[bytes] = set()
        self._fresh: dict[bytes, _Place] = {}
        # Segments that are open for reading; held while one is read, so that it is not closed.
        self._files: dict[int, int] = {}
        self._reads = threading.Lock()

    def open(self) -> None:
        """Open the table; one that is damaged is given up with all its blobs."""
        try:
            self._connect()
            self._check_after_boot()
            self._tidy()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            log.warning("context.index.damaged", path=str(self._root), cause=str(error))
            self.close()
            shutil.rmtree(self._root)
            self._connect()

    def _connect(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / "index.db"
        # Used by one thread at a time for writing; SQLite serialises the threads that read.
        self._writing = sqlite3.connect(path, check_same_thread=False)
        try:
            self._writing.execute("PRAGMA journal_mode = WAL")
            self._writing.execute("PRAGMA synchronous = OFF")
            self._writing.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            self._writing.executescript(_SCHEMA)
            self._reading = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except BaseException:
            self._writing.close()
            raise

    def _check_after_boot(self) -> None:
        """Look through the table when the machine was started since it was used.

        Raises:
            sqlite3.DatabaseError: it is damaged.
        """
        boot = _BOOT_ID.read_text().strip()
        if self._writing.execute("SELECT id FROM boots").fetchall() == [(boot,)]:
            return
        [(verdict,), *_] = self._writing.execute("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        with self._writing:
            self._writing.execute("DELETE FROM boots")
            self._writing.execute("INSERT INTO boots VALUES (?)", (boot,))

    def _tidy(self) -> None:
        """Drop segments without a row and rows without a segment."""
        known = {number for (number,) in self._writing.execute("SELECT number FROM segments")}
        there = set()
        for entry in os.scandir(self._root):
            number = entry.name.removesuffix(".seg")
            if number != entry.name:
                if number.isdecimal() and int(number) in known:
                    there.add(int(number))
                else:
                    os.unlink(entry.path)  # noqa: PTH108 - as below
        for number in known - there:
            self.remove(number)

    def close(self) -> None:
        """Close files and table; safe to call again."""
        self._end_segment()
        self._fresh.clear()
        for number in list(self._files):
            self._close_segment(number)
        for name in ("_reading", "_writing"):
            if (connection := self.__dict__.pop(name, None)) is not None:
                connection.close()

    def _path(self, number: int) -> str:
        return f"{self._root}/{number}.seg"

    def sizes(self, digests: Collection[bytes]) -> dict[bytes, int]:
        """Return the sizes of those that are stored, and mark their segments as used now."""
        found: dict[bytes, int] = {}
        segments = set()
        for some in _parts(digests):
            marks = ",".join("?" * len(some))
            for digest, segment, size in self._writing.execute(
                f"SELECT digest, segment, size_bytes FROM blobs WHERE digest IN ({marks})",  # noqa: S608 - marks
                some,
            ):
                if digest not in self._damaged:
                    found[digest] = size
                    segments.add(segment)
        now = time.time()
        with self._writing:
            self._writing.executemany(
                "UPDATE segments SET used_at = ? WHERE number = ? AND used_at < ?",
                [(now, segment, now - TOUCH_SECONDS) for segment in segments],
            )
        return found

    def put(self, blobs: Sequence[tuple[bytes, bytes | memoryview]]) -> int:
        """Store blobs that are not there yet; the caller has verified them.

        Returns:
            Bytes that were added.
        """
        known = self.sizes([digest for digest, _ in blobs])
        new = {digest: data for digest, data in blobs if known.get(digest) != len(data)}
        if not new:
            return 0
        if self._size_bytes >= SEGMENT_BYTES:
            self._end_segment()
        began = self._file < 0
        try:
            with self._writing:
                if began:
                    self._begin_segment()
                added = self._append(new)
        except BaseException:
            # What was written of it belongs to nothing; the next ones go to a new segment.
            for digest in new:
                self._fresh.pop(digest, None)
            if self._file >= 0:
                # A disk that is full needs the room for other things.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size_bytes)
            self._end_segment()
            if began:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(self._number))  # noqa: PTH108 - a path as text
            raise
        self._damaged.difference_update(new)
        return added

    def _append(self, blobs: Mapping[bytes, bytes | memoryview]) -> int:
        data = b"".join(blobs.values())
        # Asked and not counted: should the file be damaged, what is appended is found all the same.
        start = os.fstat(self._file).st_size
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        places: dict[bytes, _Place] = {}
        for digest, content in blobs.items():
            places[digest] = _Place(self._number, start, len(content))
            start += len(content)
        self._size_bytes = start
        rows = [(digest, *place) for digest, place in places.items()]
        self._writing.executemany("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?)", rows)
        self._writing.execute(
            "UPDATE segments SET size_bytes = ? WHERE number = ?", (start, self._number)
        )
        self._fresh.update(places)
        while len(self._fresh) > FRESH_BLOBS:
            del self._fresh[next(iter(self._fresh))]
        return len(data)

    def _begin_segment(self) -> None:
        cursor = self._writing.execute(
            "INSERT INTO segments (size_bytes, used_at) VALUES (0, ?)", (time.time(),)
        )
        self._number = cursor.lastrowid or 0
        self._size_bytes = 0
        self._file = os.open(self._path(self._number), _APPEND, 0o600)

    def _end_segment(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._size_bytes = 0

    def read(self, digest: bytes) -> bytes | None:
        """Return a blob as it is stored, or None."""
        place = self._fresh.get(digest)
        if place is None:
            row = self._reading.execute(
                "SELECT segment, start, size_bytes FROM blobs WHERE digest = ?", (digest,)
            ).fetchone()
            place = None if row is None else _Place(*row)
        if place is None or digest in self._damaged:
            return None
        with self._reads:
            try:
                file = self._files.get(place.segment)
                if file is None:
                    file = self._open_segment(place.segment)
            except FileNotFoundError:
                return b""
            return os.pread(file, place.size_bytes, place.start)

    def _open_segment(self, number: int) -> int:
        if len(self._files) >= OPEN_SEGMENTS:
            os.close(self._files.pop(next(iter(self._files))))
        file = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
        self._files[number] = file
        return file

    def _close_segment(self, number: int) -> None:
        with self._reads:
            if (file := self._files.pop(number, -1)) >= 0:
                os.close(file)

    def note_damaged(self, digest: bytes) -> None:
        """Take a blob for missing until it is put again."""
        self._damaged.add(digest)

    def segments(self) -> list[Segment]:
        """Return all segments."""
        rows = self._writing.execute("SELECT used_at, size_bytes, number FROM segments")
        return [Segment(*row) for row in rows]

    def segments_of(self, digests: Collection[bytes]) -> set[int]:
        """Return the numbers of the segments that hold one of these."""
        found: set[int] = set()
        for some in _parts(digests):
            marks = ",".join("?" * len(some))
            rows = self._writing.execute(
                f"SELECT DISTINCT segment FROM blobs WHERE digest IN ({marks})",  # noqa: S608 - marks
                some,
            )
            found.update(number for (number,) in rows)
        return found

    def remove(self, number: int) -> None:
        """Remove a segment with its blobs."""
        if number == self._number:
            self._end_segment()
        self._fresh = {
            digest: place for digest, place in self._fresh.items() if place.segment != number
        }
        self._close_segment(number)
        # First the file: on a full disk the table cannot be changed before there is room. Rows
        # without a file count as damaged, and the next start drops them.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(number))  # noqa: PTH108 - a path as text, as everywhere here
        with self._writing:
            self._writing.execute("DELETE FROM blobs WHERE segment = ?", (number,))
            self._writing.execute("DELETE FROM segments WHERE number = ?", (number,))


def _parts(digests: Iterable[bytes]) -> Iterator[list[bytes]]:
    iterator = iter(digests)
    while some := list(islice(iterator, _DIGESTS_PER_QUERY)):
        yield some
