"""Sticky modification times: what BuildKit was told about a listing, to be told again.

BuildKit decides by size, mtime, mode and owner whether it asks for a file again (fsutil's
metadata differ). A fresh checkout has new mtimes for old content, so stock clients send
everything; and a change that keeps size and mtime is missed. Here a path whose content is
unchanged keeps the mtime it had, and a changed one gets a later one than ever before, so BuildKit
asks for exactly what changed, and times stay monotonic for tools such as make.

This module keeps the memory; `node.telling` applies the rules. The rule that everything rests on:
under one generation of a shared key, a path and a time name one content, for ever. When that
cannot be promised any more, the generation changes, and with it BuildKit's shared key: BuildKit
then starts from an empty directory.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog

from offload_builder.node.faults import storage_error
from offload_core.errors import NodeLostError
from offload_core.listing import SHA256_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")

log = structlog.get_logger(__name__)

CONTENT_BYTES = 16
"""Of the name of a content; SHA-256 cut short."""
MAX_REMOVED = 200_000
"""Paths of former listings that are remembered for one listing; then its generation ends."""
MAX_KEYS = 256
"""Shared keys that are remembered; the one that was not used for longest goes first."""
MAX_IDLE_SECONDS = 30 * 86_400
_USED_SECONDS = 3600
"""How stale the mark of the last use may be."""
_SCHEMA_VERSION = 2
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_VARIABLES = 500
_OLD_TABLES = "DROP TABLE IF EXISTS sent; DROP TABLE IF EXISTS generation;"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS generation (
  shared_key TEXT PRIMARY KEY, value TEXT NOT NULL, used_at INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS listing (
  id INTEGER PRIMARY KEY, shared_key TEXT NOT NULL, name TEXT NOT NULL,
  changing INTEGER NOT NULL, removed INTEGER NOT NULL DEFAULT 0,
  pages BLOB NOT NULL DEFAULT x'', UNIQUE (shared_key, name)
);
CREATE TABLE IF NOT EXISTS page (
  listing INTEGER NOT NULL, digest BLOB NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
  directory INTEGER NOT NULL, entries INTEGER NOT NULL, files INTEGER NOT NULL,
  bytes INTEGER NOT NULL, linked INTEGER NOT NULL, frames BLOB NOT NULL, contents BLOB NOT NULL,
  UNIQUE (listing, digest)
);
CREATE TABLE IF NOT EXISTS removed (
  listing INTEGER NOT NULL, path BLOB NOT NULL, content BLOB NOT NULL, mtime_ns INTEGER NOT NULL,
  PRIMARY KEY (listing, path)
) WITHOUT ROWID;
PRAGMA user_version = {_SCHEMA_VERSION};
"""


class ListingKey(NamedTuple):
    """One local source under one shared key.

    Attributes:
        shared_key: with its generation, as BuildKit is told of it.
        name: of the local source.
    """

    shared_key: str
    name: str


class ToldPage(NamedTuple):
    """A page of a listing as BuildKit was told of it.

    Attributes:
        digest: SHA-256 of the page.
        first: path of the first entry.
        last: path of the last entry.
        directory: the last entry is a directory.
        entries: number of entries.
        files: entries with content.
        size_bytes: of these.
        linked: has hard links, so its times depend on other pages.
        frames: STAT packets, compressed; see `buildkit.statframes`.
        contents: `CONTENT_BYTES` for each entry; empty when they were not loaded.
    """

    digest: bytes
    first: str
    last: str
    directory: bool
    entries: int
    files: int
    size_bytes: int
    linked: bool
    frames: bytes
    contents: bytes


class Removed(NamedTuple):
    """What a path was when BuildKit was last told of it; content is empty where that is open."""

    content: bytes
    modified_at_ns: int


class FormerListing(NamedTuple):
    """What BuildKit was told last; without `ToldPage.contents`.

    Attributes:
        id: for the other calls; 0 when there is none.
        pages: in order.
        removed: number of paths that were listed once and are not any more.
    """

    id: int
    pages: list[ToldPage]
    removed: int


class StickyTimes:
    """The memory of one project.

    The methods block; use them through `run`, or from one other thread at a time.
    """

    def __init__(self, path: Path) -> None:
        """Open the database.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the file cannot be used.
        """
        self._path = path
        self._lock = threading.Lock()
        self._generations: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._db = self._open_anew(error)
        except (OSError, sqlite3.Error) as error:
            raise storage_error("open the table of file times", error) from error
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="listing")

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != _SCHEMA_VERSION:
                database.executescript(_OLD_TABLES)
            database.executescript(_SCHEMA)
            _prune(database)
        except BaseException:
            database.close()
            raise
        return database

    def _open_anew(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        # A damaged table is worth nothing; new generations make the loss harmless.
        log.warning("times.damaged", path=str(self._path), error=str(error))
        self._generations.clear()
        # An old write-ahead log beside a new database would be played into it.
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        return self._open()

    def close(self) -> None:
        """Wait for what runs, and close the database."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._db.close()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the thread for listings."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )

    # Generations.

    def known_generation(self, shared_key: str) -> str:
        """Return the generation if that needs no disk, else an empty text; for any thread."""
        return self._generations.get(shared_key, "")

    def generation(self, shared_key: str) -> str:
        """Return the random part that belongs to a shared key for as long as its memory is whole.

        No build may be using the key.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            row = database.execute(
                "SELECT value, used_at FROM generation WHERE shared_key = ?", (shared_key,)
            ).fetchone()
            now = int(time.time())
            if row is not None and _is_broken(database, f"{shared_key}-{row[0]}"):
                # The node died while BuildKit was being told something new.
                _retire(database, f"{shared_key}-{row[0]}")
                row = None
            if row is None:
                row = (secrets.token_hex(6), now)
                database.execute("INSERT INTO generation VALUES (?, ?, ?)", (shared_key, *row))
                for dropped in _prune(database):
                    self._generations.pop(dropped, None)
        self._generations[shared_key] = row[0]
        return str(row[0])

    def retire(self, shared_key: str) -> None:
        """Forget a shared key, given with its generation; the next build gets another one.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        self._forget(shared_key)
        with self._guarded() as database:
            _retire(database, shared_key)

    def _forget(self, shared_key: str) -> None:
        self._generations.pop(shared_key.rpartition("-")[0], None)

    # Listings.

    def load(self, key: ListingKey) -> FormerListing:
        """Return what BuildKit was told last of a local source.

        Raises:
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            _note_use(database, key.shared_key)
            row = database.execute(
                "SELECT id, pages, removed FROM listing WHERE shared_key = ? AND name = ?", key
            ).fetchone()
            if row is None:
                return FormerListing(0, [], 0)
            number, names, removed = row
            found = database.execute(
                "SELECT digest, first, last, directory, entries, files, bytes, linked, frames "
                "FROM page WHERE listing = ?",
                (number,),
            )
            pages = {
                digest: ToldPage(
                    digest, first, last, bool(directory), entries, files, size, bool(linked),
                    frames, b"",
                )
                for digest, first, last, directory, entries, files, size, linked, frames in found
            }  # fmt: skip
            order = [names[at : at + SHA256_BYTES] for at in range(0, len(names), SHA256_BYTES)]
            if set(order) != set(pages):
                self._forget(key.shared_key)
                _retire(database, key.shared_key)
                raise NodeLostError("the table of the times of the build's files was damaged")
            return FormerListing(number, [pages[digest] for digest in order], removed)

    def contents(self, listing: int, digest: bytes) -> bytes:
        """Return `ToldPage.contents` of a page of a former listing."""
        with self._guarded() as database:
            row = database.execute(
                "SELECT contents FROM page WHERE listing = ? AND digest = ?", (listing, digest)
            ).fetchone()
        return bytes(row[0])

    def removed(self, listing: int, paths: Sequence[bytes]) -> dict[bytes, Removed]:
        """Return what is remembered of paths that the last listing did not have, by their name."""
        found: dict[bytes, Removed] = {}
        with self._guarded() as database:
            for start in range(0, len(paths), _VARIABLES):
                some = paths[start : start + _VARIABLES]
                marks = ",".join("?" * len(some))
                where = f"listing = ? AND path IN ({marks})"
                rows = database.execute(
                    f"SELECT path, content, mtime_ns FROM removed WHERE {where}",  # noqa: S608 - only marks
                    (listing, *some),
                )
                found.update((path, Removed(content, mtime)) for path, content, mtime in rows)
        return found

    def begin(self, key: ListingKey) -> None:
        """Note that BuildKit is going to be told something new, before it is.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        self._forget(key.shared_key)
        with self._guarded() as database:
            _note_change(database, key, 1)

    def commit(
        self,
        key: ListingKey,
        pages: Sequence[ToldPage],
        changed: Iterable[ToldPage],
        removed: Mapping[bytes, Removed],
        back: Collection[bytes],
    ) -> None:
        """Remember a listing that BuildKit has been told but for its end; after `begin`.

        Args:
            key: of the listing.
            pages: all of it.
            changed: those of its pages that were not told like this before, with contents.
            removed: paths, by their name, that it does not have any more.
            back: names of paths that were removed once and are listed again.

        Raises:
            QuotaExceededError: the disk is full; the end must not be told.
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            database.execute("BEGIN IMMEDIATE")
            # Once more: the key may have been dropped meanwhile, as one of too many.
            number = _note_change(database, key, 0)
            self._replace_pages(database, number, pages, changed)
            database.executemany(
                "DELETE FROM removed WHERE listing = ? AND path = ?",
                [(number, path) for path in back],
            )
            database.executemany(
                "INSERT INTO removed VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "content = CASE WHEN excluded.mtime_ns > mtime_ns THEN excluded.content "
                "ELSE x'' END, mtime_ns = max(mtime_ns, excluded.mtime_ns)",
                [(number, path, *what) for path, what in removed.items()],
            )
            database.execute(
                "UPDATE listing SET pages = ?1, removed = "
                "(SELECT count(*) FROM removed WHERE listing = ?2) WHERE id = ?2",
                (b"".join(page.digest for page in pages), number),
            )
            database.execute("COMMIT")

    @staticmethod
    def _replace_pages(
        database: sqlite3.Connection,
        number: int,
        pages: Sequence[ToldPage],
        changed: Iterable[ToldPage],
    ) -> None:
        kept = {page.digest for page in pages}
        old = database.execute("SELECT digest FROM page WHERE listing = ?", (number,))
        database.executemany(
            "DELETE FROM page WHERE listing = ? AND digest = ?",
            [(number, digest) for (digest,) in old.fetchall() if digest not in kept],
        )
        database.executemany(
            "INSERT OR REPLACE INTO page VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(number, *page) for page in changed],
        )

    def settle(self, key: ListingKey) -> None:
        """Note that BuildKit has taken what it was told.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            database.execute(
                "UPDATE listing SET changing = changing - 1 WHERE shared_key = ? AND name = ? "
                "AND changing > 0 AND removed <= ?",
                (*key, MAX_REMOVED),
            )

    # Faults.

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        """Undo what was begun when the database fails; replace the database if it is damaged."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                self._repair(error)
                raise storage_error("keep the times of the build's files", error) from error

    def _repair(self, error: sqlite3.Error) -> None:
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError) and _is_damage(error):
                self._db.close()
                self._db = self._open_anew(error)
        except (OSError, sqlite3.Error) as worse:
            log.error("times.repair.failed", path=str(self._path), error=str(worse))


def _note_use(database: sqlite3.Connection, shared_key: str) -> None:
    base, _, value = shared_key.rpartition("-")
    now = int(time.time())
    database.execute(
        "UPDATE generation SET used_at = ? WHERE shared_key = ? AND value = ? AND used_at < ?",
        (now, base, value, now - _USED_SECONDS),
    )


def _note_change(database: sqlite3.Connection, key: ListingKey, more: int) -> int:
    row = database.execute(
        "INSERT INTO listing (shared_key, name, changing) VALUES (?, ?, 1) "
        "ON CONFLICT DO UPDATE SET changing = changing + ? RETURNING id",
        (*key, more),
    ).fetchone()
    return int(row[0])


def _is_broken(database: sqlite3.Connection, shared_key: str) -> bool:
    row = database.execute(
        "SELECT 1 FROM listing WHERE shared_key = ? AND changing", (shared_key,)
    ).fetchone()
    return row is not None


def _retire(database: sqlite3.Connection, shared_key: str) -> None:
    base, _, value = shared_key.rpartition("-")
    database.execute("BEGIN IMMEDIATE")
    database.execute("DELETE FROM generation WHERE shared_key = ? AND value = ?", (base, value))
    _drop_listings(database, "shared_key = ?", shared_key)
    database.execute("COMMIT")


def _drop_listings(database: sqlite3.Connection, where: str, *values: object) -> None:
    rows = database.execute(f"SELECT id FROM listing WHERE {where}", values)  # noqa: S608 - constant
    for (number,) in rows.fetchall():
        database.execute("DELETE FROM page WHERE listing = ?", (number,))
        database.execute("DELETE FROM removed WHERE listing = ?", (number,))
        database.execute("DELETE FROM listing WHERE id = ?", (number,))


def _prune(database: sqlite3.Connection) -> list[str]:
    """Forget keys that nobody uses any more, and what belongs to no key.

    Returns:
        The keys that are forgotten.
    """
    database.execute("BEGIN IMMEDIATE")
    rows = database.execute(
        "DELETE FROM generation WHERE used_at < ?1 OR shared_key IN "
        "(SELECT shared_key FROM generation ORDER BY used_at DESC LIMIT -1 OFFSET ?2) "
        "RETURNING shared_key",
        (int(time.time()) - MAX_IDLE_SECONDS, MAX_KEYS),
    ).fetchall()
    _drop_listings(
        database, "shared_key NOT IN (SELECT shared_key || '-' || value FROM generation)"
    )
    database.execute("COMMIT")
    return [key for (key,) in rows]


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
