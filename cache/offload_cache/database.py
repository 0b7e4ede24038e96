"""The node's index of its cache in SQLite: what is queued, what is published, what is known.

All access goes through one thread: SQLite serialises writers anyway, and nothing then waits for a
lock on the event loop. Losing the file costs pending uploads and remembered facts, never blobs.
"""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from offload_core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
_log = structlog.get_logger(__name__)

_SCHEMA_VERSION = 2
_CONTRIBUTIONS = """
CREATE TABLE contributions (
    project TEXT NOT NULL, scope TEXT NOT NULL, id TEXT NOT NULL, key TEXT NOT NULL,
    created_at REAL NOT NULL, listed INTEGER NOT NULL, publication INTEGER,
    document BLOB NOT NULL, UNIQUE (project, scope, id));
CREATE INDEX contributions_by_age ON contributions (project, created_at);
CREATE TABLE uses (
    project TEXT NOT NULL, scope TEXT NOT NULL, key TEXT NOT NULL, used_at REAL NOT NULL,
    PRIMARY KEY (project, scope, key)) WITHOUT ROWID;
"""
_SCHEMA = """
CREATE TABLE presence (
    project TEXT NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, checked_at REAL NOT NULL,
    PRIMARY KEY (project, digest)) WITHOUT ROWID;
CREATE TABLE publications (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, project TEXT NOT NULL,
    created_at REAL NOT NULL);
CREATE INDEX publications_by_name ON publications (name);
CREATE TABLE upload_items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    publication INTEGER NOT NULL REFERENCES publications (id) ON DELETE CASCADE,
    stage INTEGER NOT NULL, project TEXT NOT NULL, object_key TEXT NOT NULL, digest TEXT,
    body BLOB, size_bytes INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0);
CREATE INDEX upload_items_by_publication ON upload_items (publication, stage);
CREATE INDEX upload_items_by_key ON upload_items (object_key);
"""
_UPGRADE_FROM_1 = """
DROP TABLE entries;
ALTER TABLE upload_items ADD COLUMN done INTEGER NOT NULL DEFAULT 0;
DELETE FROM publications WHERE name LIKE 'projects/%/scopes/%';
"""


# An index that is whole, on a disk that is full or ill, or in use: it holds uploads that wait.
# Source: SQLite, "Result and Error Codes".
_NOT_DAMAGED = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_PRIMARY_CODE = 0xFF


class CacheDatabase:
    """One SQLite file and its thread; an async context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-index")
        self._connection: sqlite3.Connection | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._connection = await loop.run_in_executor(self._thread, self._open)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, connection.close)
        self._thread.shutdown(wait=True)

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE in _NOT_DAMAGED:
                raise InternalError(
                    f"the cache's index {self._path} cannot be opened now: {error}; free the disk "
                    "if it is full, and end other programs that use the file"
                ) from error
            # The index can be rebuilt from use; a damaged one must not stop the node.
            damaged = self._path.with_suffix(".damaged")
            self._path.replace(damaged)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            _log.warning("cache.index.damaged", cause=str(error), kept=str(damaged))
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in {0, 1, _SCHEMA_VERSION}:
                raise sqlite3.DatabaseError(f"schema version {version} is not known")
            if version != _SCHEMA_VERSION:
                script = (_UPGRADE_FROM_1 if version == 1 else _SCHEMA) + _CONTRIBUTIONS
                connection.executescript(
                    f"BEGIN; {script} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
                )
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction, which is rolled back when it raises.

        A caller that is cancelled does not undo what its `work` did.
        """
        connection = self._connection
        if connection is None:
            raise RuntimeError("the cache index is not open")

        def transaction() -> T:
            with connection:
                result = work(connection)
            if isinstance(result, sqlite3.Cursor):
                # Freed by another thread it would reset a statement that this one is using.
                result.close()
            return result

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
