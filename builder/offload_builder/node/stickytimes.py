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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from offload_proto.v1.node_service_pb2 import ContextEntry

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
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._cache: dict[str, dict[str, tuple[bytes, int]]] = {}
        self._open()

    def _open(self) -> None:
        try:
            self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            # A damaged table is worth nothing; a new generation makes the loss harmless.
            self._path.unlink(missing_ok=True)
            self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def generation(self, shared_key: str) -> str:
        """Return the random part that belongs to a shared key for as long as its table lives."""
        self._db.execute(
            "INSERT OR IGNORE INTO generation VALUES (?, ?)", (shared_key, secrets.token_hex(6))
        )
        row = self._db.execute(
            "SELECT value FROM generation WHERE shared_key = ?", (shared_key,)
        ).fetchone()
        return str(row[0])

    def apply(self, shared_key: str, entries: Iterable[ContextEntry]) -> None:
        """Set `modified_at_unix_ns` of every entry, and remember what was set."""
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
            with self._transaction():
                self._db.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?)", changed)

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("BEGIN")
        return self._db

    def _known(self, shared_key: str) -> dict[str, tuple[bytes, int]]:
        known = self._cache.get(shared_key)
        if known is None:
            rows = self._db.execute(
                "SELECT path, content, mtime_ns FROM sent WHERE shared_key = ?", (shared_key,)
            )
            known = {path: (content, mtime) for path, content, mtime in rows}
            if len(self._cache) >= 16:
                self._cache.pop(next(iter(self._cache)))
            self._cache[shared_key] = known
        return known
