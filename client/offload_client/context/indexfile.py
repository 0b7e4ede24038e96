"""The SQLite file of the stat index: opened late, shared by processes, given up at the first fault.

It only saves time. When it is locked, damaged or cannot be written, it is empty.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FORMAT_VERSION = 2
_TABLES = """
DROP TABLE IF EXISTS directories;
DROP TABLE IF EXISTS chunk_lists;
CREATE TABLE directories (
  root BLOB NOT NULL,
  path BLOB NOT NULL,
  used_on INTEGER NOT NULL,
  checksum INTEGER NOT NULL,
  data BLOB NOT NULL,
  PRIMARY KEY (root, path)
);
CREATE TABLE chunk_lists (
  sha256 BLOB NOT NULL PRIMARY KEY,
  used_on INTEGER NOT NULL,
  data BLOB NOT NULL
);
"""
_LOCK_POLL_SECONDS = 0.005
_LOCK_WAIT_SECONDS = 1.0


class IndexFile:
    """The open file; for one thread at a time; closed by its owner."""

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is opened before it is read.

        Args:
            path: made with its directories when missing.
        """
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self.problem = ""
        """Why it is out of use; empty while it works."""

    @property
    def opened(self) -> bool:
        """It is open and works."""
        return self._connection is not None

    def exists(self) -> bool:
        """Return whether there is a file already."""
        return self._path.exists()

    def close(self) -> None:
        """Close; harmless when done twice. It can be read again."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def rows(self, query: str, values: Sequence[object]) -> list[Any]:
        """Return what a query finds; nothing when the file is out of use."""
        import sqlite3

        if self.problem:
            return []
        try:
            return self._opened().execute(query, values).fetchall()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
            return []

    def write(self, statements: Iterable[tuple[str, Sequence[tuple[object, ...]]]]) -> bool:
        """Run statements, each with every row of its values, in one transaction.

        Returns:
            Whether it worked; False also when the file is not open.
        """
        import sqlite3

        if self._connection is None:
            return False
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                for statement, rows in statements:
                    self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            self._fail(error)
            return False
        return True

    def _opened(self) -> sqlite3.Connection:
        import sqlite3

        if self._connection is not None:
            return self._connection
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The owner keeps to one thread at a time, but not always to the same one.
        connection = sqlite3.connect(
            self._path,
            timeout=_LOCK_WAIT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        # Kept even when the next line fails, so that `close` finds it.
        self._connection = connection
        _use_wal(connection)
        # A power cut may lose or damage the file; the checksums then tell, and files are read.
        connection.execute("PRAGMA synchronous = OFF")
        if _version(connection) == FORMAT_VERSION:
            return connection
        with contextlib.suppress(OSError):
            self._path.chmod(0o600)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if _version(connection) == FORMAT_VERSION:
                # Another process was faster.
                return connection
            # `executescript` would end the transaction.
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        return connection

    def _fail(self, error: Exception) -> None:
        import sqlite3

        self.problem = str(error)
        self.close()
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
