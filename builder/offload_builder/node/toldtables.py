"""The tables of sticky times, and what is done to several of them at once.

Everything here takes an open database; `node.stickytimes` owns it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from offload_core.listing import SHA256_BYTES

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

CONTENT_BYTES = 16
"""Of the name of a content; SHA-256 cut short."""
MAX_REMOVED = 200_000
"""Paths of former listings that are remembered for one listing; then its generation ends."""
MAX_KEYS = 256
"""Shared keys that are remembered; the one that was not used for longest goes first."""
MAX_IDLE_SECONDS = 30 * 86_400
_USED_SECONDS = 3600
"""How stale the mark of the last use may be."""
SCHEMA_VERSION = 2
OLD_TABLES = "DROP TABLE IF EXISTS sent; DROP TABLE IF EXISTS generation;"
SCHEMA = f"""
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
PRAGMA user_version = {SCHEMA_VERSION};
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


def note_use(database: sqlite3.Connection, shared_key: str) -> None:
    """Keep a shared key, given with its generation, from being forgotten as unused."""
    base, _, value = shared_key.rpartition("-")
    now = int(time.time())
    database.execute(
        "UPDATE generation SET used_at = ? WHERE shared_key = ? AND value = ? AND used_at < ?",
        (now, base, value, now - _USED_SECONDS),
    )


def note_change(database: sqlite3.Connection, key: ListingKey, more: int) -> int:
    """Note `more` listings that BuildKit is being told; return the number of the row."""
    row = database.execute(
        "INSERT INTO listing (shared_key, name, changing) VALUES (?, ?, 1) "
        "ON CONFLICT DO UPDATE SET changing = changing + ? RETURNING id",
        (*key, more),
    ).fetchone()
    return int(row[0])


def is_broken(database: sqlite3.Connection, shared_key: str) -> bool:
    """Return whether BuildKit was told something that it may not have taken."""
    row = database.execute(
        "SELECT 1 FROM listing WHERE shared_key = ? AND changing", (shared_key,)
    ).fetchone()
    return row is not None


def retire(database: sqlite3.Connection, shared_key: str) -> None:
    """Forget a shared key, given with its generation, and all of its listings."""
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


def prune(database: sqlite3.Connection) -> list[str]:
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


def load_pages(database: sqlite3.Connection, listing: int) -> dict[bytes, ToldPage]:
    """Return the pages of a listing by digest, without their contents."""
    found = database.execute(
        "SELECT digest, first, last, directory, entries, files, bytes, linked, frames "
        "FROM page WHERE listing = ?",
        (listing,),
    )
    return {
        digest: ToldPage(
            digest, first, last, bool(directory), entries, files, size, bool(linked), frames, b""
        )
        for digest, first, last, directory, entries, files, size, linked, frames in found
    }


def replace_pages(
    database: sqlite3.Connection,
    listing: int,
    pages: Sequence[ToldPage],
    changed: Iterable[ToldPage],
) -> None:
    """Keep those of a listing's rows that are among `pages`, and write the changed ones."""
    kept = {page.digest for page in pages}
    old = database.execute("SELECT digest FROM page WHERE listing = ?", (listing,))
    database.executemany(
        "DELETE FROM page WHERE listing = ? AND digest = ?",
        [(listing, digest) for (digest,) in old.fetchall() if digest not in kept],
    )
    database.executemany(
        "INSERT OR REPLACE INTO page VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(listing, *page) for page in changed],
    )
    database.execute(
        "UPDATE listing SET pages = ?1, removed = "
        "(SELECT count(*) FROM removed WHERE listing = ?2) WHERE id = ?2",
        (b"".join(page.digest for page in pages), listing),
    )


def page_names(pages: bytes) -> list[bytes]:
    """Return the digests that a listing's row has as one value."""
    return [pages[at : at + SHA256_BYTES] for at in range(0, len(pages), SHA256_BYTES)]
