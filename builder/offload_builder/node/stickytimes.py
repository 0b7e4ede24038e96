"""Sticky modification times: what BuildKit was told about a file before is told again.

BuildKit decides by size, mtime, mode and owner whether it asks for a file again (fsutil's
metadata differ). A fresh checkout has new mtimes for old content, so stock clients send
everything; and a change that keeps size and mtime is missed. Here a path whose digest is
unchanged keeps the mtime it had, and a changed one gets a later one than ever before, so BuildKit
asks for exactly what changed, and times stay monotonic for tools such as make.
"""

from __future__ import annotations

import secrets
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.faults import storage_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from offload_proto.v1.node_service_pb2 import ContextEntry

log = structlog.get_logger(__name__)

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CACHED_KEYS = 16
_SCHEMA = """
CREATE TABLE IF NOT EXISTS generation (shared_key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
  shared_key TEXT NOT NULL, path TEXT NOT NULL, content BLOB NOT NULL, mtime_ns INTEGER NOT NULL,
  PRIMARY KEY (shared_key, path)
) WITHOUT ROWID;
"""


class StickyTimes:
    """The table for one project; blocking, used from one thread.

    When the database is lost, `generation` changes, and with it BuildKit's shared key: BuildKit
    then starts from an empty directory instead of trusting times that nobody remembers.
    """

    def __init__(self, path: Path) -> None:
        """Open the table.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the file cannot be used.
        """
        self._path = path
        self._cache: dict[str, dict[str, tuple[bytes, int]]] = {}
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

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _open_anew(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        # A damaged table is worth nothing; new generations make the loss harmless.
        log.warning("times.damaged", path=str(self._path), error=str(error))
        self._cache.clear()
        self._generations.clear()
        # An old write-ahead log beside a new database would be played into it.
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        return self._open()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def known_generation(self, shared_key: str) -> str:
        """Return the generation if that needs no disk, else an empty text; for any thread."""
        return self._generations.get(shared_key, "")

    def generation(self, shared_key: str) -> str:
        """Return the random part that belongs to a shared key for as long as its table lives.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the table cannot be used.
        """
        with self._guarded(shared_key):
            self._db.execute(
                "INSERT OR IGNORE INTO generation VALUES (?, ?)", (shared_key, secrets.token_hex(6))
            )
            row = self._db.execute(
                "SELECT value FROM generation WHERE shared_key = ?", (shared_key,)
            ).fetchone()
        self._generations[shared_key] = str(row[0])
        return str(row[0])

    def apply(self, shared_key: str, entries: Iterable[ContextEntry]) -> None:
        """Set `modified_at_unix_ns` of every entry, and remember what was set.

        Raises:
            QuotaExceededError: the disk is full; a time that is not remembered must not be told.
            NodeLostError: the table cannot be used.
        """
        with self._guarded(shared_key):
            self._apply(shared_key, entries)

    def _apply(self, shared_key: str, entries: Iterable[ContextEntry]) -> None:
        known = self._known(shared_key)
        changed: list[tuple[str, str, bytes, int]] = []
        for entry in entries:
            content = entry.sha256 or entry.link_name.encode()
            for name in sorted(entry.xattrs):
                content += name.encode() + b"\0" + entry.xattrs[name] + b"\0"
            before = known.get(entry.path)
            if before is None:
                mtime = entry.modified_at_unix_ns
            elif before[0] == content:
                entry.modified_at_unix_ns = before[1]
                continue
            else:
                mtime = max(entry.modified_at_unix_ns, before[1] + 1)
            entry.modified_at_unix_ns = mtime
            known[entry.path] = (content, mtime)
            changed.append((shared_key, entry.path, content, mtime))
        if changed:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?)", changed)
            self._db.execute("COMMIT")

    @contextmanager
    def _guarded(self, shared_key: str) -> Iterator[None]:
        """Undo what was begun when the database fails; replace the database if it is damaged."""
        try:
            yield
        except sqlite3.Error as error:
            # What memory says and the disk does not would be forgotten by the next start.
            self._cache.pop(shared_key, None)
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

    def _known(self, shared_key: str) -> dict[str, tuple[bytes, int]]:
        known = self._cache.get(shared_key)
        if known is None:
            rows = self._db.execute(
                "SELECT path, content, mtime_ns FROM sent WHERE shared_key = ?", (shared_key,)
            )
            known = {path: (content, mtime) for path, content, mtime in rows}
            if len(self._cache) >= _CACHED_KEYS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[shared_key] = known
        return known


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
