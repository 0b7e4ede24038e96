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
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from offload_builder.node import toldtables as tables
from offload_builder.node.faults import storage_error
from offload_builder.node.toldtables import FormerListing, ListingKey, Removed, ToldPage
from offload_core.errors import NodeLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")

log = structlog.get_logger(__name__)

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_VARIABLES = 500


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
            if version != tables.SCHEMA_VERSION:
                database.executescript(tables.OLD_TABLES)
            database.executescript(tables.SCHEMA)
            tables.prune(database)
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
                "SELECT value FROM generation WHERE shared_key = ?", (shared_key,)
            ).fetchone()
            if row is not None and tables.is_broken(database, f"{shared_key}-{row[0]}"):
                # The node died while BuildKit was being told something new.
                tables.retire(database, f"{shared_key}-{row[0]}")
                row = None
            if row is None:
                row = (secrets.token_hex(6),)
                database.execute(
                    "INSERT INTO generation VALUES (?, ?, ?)",
                    (shared_key, *row, int(time.time())),
                )
                for dropped in tables.prune(database):
                    self._generations.pop(dropped, None)
        self._generations[shared_key] = row[0]
        return str(row[0])

    def knows(self, shared_key: str) -> bool:
        """Return whether a shared key has a generation.

        Raises:
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            found = database.execute(
                "SELECT 1 FROM generation WHERE shared_key = ?", (shared_key,)
            ).fetchone()
        return found is not None

    def retire(self, shared_key: str) -> None:
        """Forget a shared key, given with its generation; the next build gets another one.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        self._forget(shared_key)
        with self._guarded() as database:
            tables.retire(database, shared_key)

    def _forget(self, shared_key: str) -> None:
        self._generations.pop(shared_key.rpartition("-")[0], None)

    # Listings.

    def load(self, key: ListingKey) -> FormerListing:
        """Return what BuildKit was told last of a local source.

        Raises:
            NodeLostError: the table cannot be used.
        """
        with self._guarded() as database:
            tables.note_use(database, key.shared_key)
            row = database.execute(
                "SELECT id, pages, removed FROM listing WHERE shared_key = ? AND name = ?", key
            ).fetchone()
            if row is None:
                return FormerListing(0, [], 0)
            number, names, removed = row
            pages = tables.load_pages(database, number)
            order = tables.page_names(names)
            if set(order) != set(pages):
                self._forget(key.shared_key)
                tables.retire(database, key.shared_key)
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
            tables.note_change(database, key, 1)

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
            number = tables.note_change(database, key, 0)
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
            tables.replace_pages(database, number, pages, changed)
            database.execute("COMMIT")

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
                (*key, tables.MAX_REMOVED),
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


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
