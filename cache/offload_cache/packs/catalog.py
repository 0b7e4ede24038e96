"""What a node knows of a project's packs: for each blob the pack, the frame and the place in it.

A SQLite file, because 500,000 blobs as Python objects would take over 100 MB and a restart would
have to read every index again; as rows they take about 25 bytes each on disk, whose pages are
shared with nobody's heap. A blob is found by the first 8 bytes of its digest: what is read is
verified anyway, and two blobs that share these bytes cost a miss, nothing else.
"""

from __future__ import annotations

import sqlite3
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from offload_cache.packs.layout import PackIndex

T = TypeVar("T")
_log = structlog.get_logger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE packs (
    name TEXT PRIMARY KEY, first_frame INTEGER NOT NULL, last_frame INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL, usable INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE frames (
    id INTEGER PRIMARY KEY, pack TEXT NOT NULL, position INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL, size_bytes INTEGER NOT NULL, raw INTEGER NOT NULL);
CREATE TABLE blobs (
    key INTEGER PRIMARY KEY, frame INTEGER NOT NULL, position INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL);
"""
_KEY = struct.Struct("<q")
_PARAMETERS = 1000
"""Values in one query; SQLite's planner takes longer than the look-ups beyond some thousands."""
_CACHE_KIB = 8 << 10
_MAPPED_BYTES = 256 << 20


class BlobPlace(NamedTuple):
    """Where a blob lies in its unpacked frame."""

    digest: bytes
    position: int
    size_bytes: int


@dataclass(slots=True)
class FramePlace:
    """Where a frame lies in its pack, and which of its blobs are wanted."""

    pack: str
    position: int
    stored_bytes: int
    size_bytes: int
    raw: bool
    blobs: list[BlobPlace] = field(default_factory=list)


def blob_key(digest: bytes) -> int:
    """Return the number under which a blob is kept."""
    key: int = _KEY.unpack_from(digest)[0]
    return key


class PackCatalog:
    """One project's packs. Every method blocks shortly; any thread may call it.

    Nothing raises: what the file cannot tell is not known. A file that is damaged or full is
    replaced by an empty one, in memory if need be, and filled again from the shared store.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self.listed_at = 0.0
        """Monotonic time of the last complete listing of the shared store; 0 for never."""

    def open(self) -> None:
        """Open the file, or begin anew."""
        with self._lock:
            self._connection = self._open()

    def close(self) -> None:
        """Close the file; afterwards nothing is known."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return _connect(str(self._path))
        except (sqlite3.Error, OSError) as error:
            _log.warning("context.catalog.damaged", path=str(self._path), cause=str(error))
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return _connect(str(self._path))
        except (sqlite3.Error, OSError):
            return _connect(":memory:")

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        with self._lock:
            connection = self._connection
            if connection is None:
                return otherwise
            try:
                with connection:
                    return work(connection)
            except sqlite3.Error as error:
                _log.warning("context.catalog.failed", path=str(self._path), cause=str(error))
                connection.close()
                self._discard()
                return otherwise

    def _discard(self) -> None:
        """Begin anew without the file, which failed in use: damaged, or its disk is full."""
        self.listed_at = 0.0
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._connection = _connect(str(self._path))
        except (sqlite3.Error, OSError):
            self._connection = _connect(":memory:")

    def present(self, digests: Collection[bytes]) -> set[bytes]:
        """Return those that are in a pack."""

        def work(connection: sqlite3.Connection) -> set[bytes]:
            by_key = {blob_key(digest): digest for digest in digests}
            return {by_key[row[0]] for row in _select(connection, "SELECT key FROM blobs", by_key)}

        return self._run(work, set())

    def locate(self, digests: Collection[bytes]) -> list[FramePlace]:
        """Return the frames that hold blobs, pack by pack, in their order there."""

        def work(connection: sqlite3.Connection) -> list[FramePlace]:
            by_key = {blob_key(digest): digest for digest in digests}
            wanted: dict[int, list[BlobPlace]] = {}
            query = "SELECT key, frame, position, size_bytes FROM blobs"
            for key, frame, position, size in _select(connection, query, by_key):
                wanted.setdefault(frame, []).append(BlobPlace(by_key[key], position, size))
            query = "SELECT id, pack, position, stored_bytes, size_bytes, raw FROM frames"
            found = [
                FramePlace(pack, position, stored, size, bool(raw), sorted(wanted[number], key=_at))
                for number, pack, position, stored, size, raw in _select(
                    connection, query, wanted, column="id"
                )
            ]
            return sorted(found, key=lambda place: (place.pack, place.position))

        return self._run(work, [])

    def names(self) -> set[str]:
        """Return the packs that are known, with those that turned out to be of no use."""
        query = "SELECT name FROM packs"
        return self._run(lambda connection: {row[0] for row in connection.execute(query)}, set())

    def small_packs(self, below_bytes: int) -> list[str]:
        """Return the packs with fewer stored bytes, oldest first."""
        query = "SELECT name FROM packs WHERE usable AND stored_bytes < ? ORDER BY name"
        return self._run(
            lambda connection: [row[0] for row in connection.execute(query, (below_bytes,))], []
        )

    def counts(self) -> tuple[int, int]:
        """Return how many blobs and packs are known."""
        query = "SELECT (SELECT count(*) FROM blobs), (SELECT count(*) FROM packs WHERE usable)"
        return self._run(lambda connection: tuple(connection.execute(query).fetchone()), (0, 0))

    def next_frame(self) -> int:
        """Return the number that the next frame will have at least."""
        return self._run(_next_frame, 1)

    def add(self, name: str, index: PackIndex, *, replace_before: int | None = None) -> None:
        """Take in what a pack holds; a pack that is known stays as it is.

        Args:
            name: of the pack.
            index: of the pack.
            replace_before: a blob that is known from a frame below this number is found in this
                pack from now on, all others where they were; None for all to stay.
        """

        def work(connection: sqlite3.Connection) -> None:
            if connection.execute("SELECT 1 FROM packs WHERE name = ?", (name,)).fetchone():
                return
            first = _next_frame(connection)
            connection.execute(
                "INSERT INTO packs VALUES (?, ?, ?, ?, 1)",
                (name, first, first + len(index.frames) - 1, index.stored_bytes),
            )
            connection.executemany(
                "INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (first + number, name, offset, frame.stored_bytes, frame.size_bytes, frame.raw)
                    for number, (frame, offset) in enumerate(
                        zip(index.frames, index.offsets(), strict=True)
                    )
                ),
            )
            # In the order of their keys: neighbours share pages of the tree.
            connection.executemany(
                "INSERT INTO blobs VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
                " frame = excluded.frame, position = excluded.position,"
                " size_bytes = excluded.size_bytes WHERE frame < ?",
                sorted(
                    (blob_key(digest), first + number, position, size, replace_before or 0)
                    for digest, number, position, size in index.blobs()
                ),
            )

        self._run(work, None)

    def forget(self, names: Iterable[str]) -> None:
        """Drop packs that are no longer in the shared store."""
        self._run(lambda connection: _drop(connection, list(names), remember=False), None)

    def reject(self, name: str) -> None:
        """Drop a pack for good: it is still in the shared store but not whole."""
        self._run(lambda connection: _drop(connection, [name], remember=True), None)

    def mark_listed(self, *, never: bool = False) -> None:
        """Note that the shared store was listed completely, or must be again."""
        self.listed_at = 0.0 if never else time.monotonic()


def _at(place: BlobPlace) -> int:
    return place.position


def _next_frame(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT coalesce(max(last_frame), 0) + 1 FROM packs").fetchone()
    return int(row[0])


def _select(
    connection: sqlite3.Connection, query: str, values: Iterable[int], *, column: str = "key"
) -> Iterable[tuple[Any, ...]]:
    pending: Sequence[int] = list(values)
    for start in range(0, len(pending), _PARAMETERS):
        part = pending[start : start + _PARAMETERS]
        marks = ",".join("?" * len(part))
        yield from connection.execute(f"{query} WHERE {column} IN ({marks})", part)


def _drop(connection: sqlite3.Connection, names: Sequence[str], *, remember: bool) -> None:
    for name in names:
        row = connection.execute(
            "SELECT first_frame, last_frame FROM packs WHERE name = ?", (name,)
        ).fetchone()
        if row is not None:
            connection.execute("DELETE FROM blobs WHERE frame BETWEEN ? AND ?", row)
            connection.execute("DELETE FROM frames WHERE id BETWEEN ? AND ?", row)
            connection.execute("DELETE FROM packs WHERE name = ?", (name,))
        if remember:
            connection.execute("INSERT INTO packs VALUES (?, 0, 0, 0, 0)", (name,))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A crash may lose what the shared store says again.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in {0, _SCHEMA_VERSION}:
            raise sqlite3.DatabaseError(f"schema version {version} is not known")
        if version == 0:
            connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )
    except sqlite3.Error:
        connection.close()
        raise
    return connection
