from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from offload_cache.database import CacheDatabase
from offload_core.errors import InternalError

if TYPE_CHECKING:
    from pathlib import Path

# The tables of version 1, as far as the upgrade touches them.
VERSION_1 = """
CREATE TABLE presence (
    project TEXT NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, checked_at REAL NOT NULL,
    PRIMARY KEY (project, digest)) WITHOUT ROWID;
CREATE TABLE entries (
    project TEXT NOT NULL, scope TEXT NOT NULL, key TEXT NOT NULL,
    document BLOB NOT NULL, created_at REAL NOT NULL,
    PRIMARY KEY (project, scope, key)) WITHOUT ROWID;
CREATE TABLE publications (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, project TEXT NOT NULL,
    created_at REAL NOT NULL);
CREATE INDEX publications_by_name ON publications (name);
CREATE TABLE upload_items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    publication INTEGER NOT NULL REFERENCES publications (id) ON DELETE CASCADE,
    stage INTEGER NOT NULL, project TEXT NOT NULL, object_key TEXT NOT NULL, digest TEXT,
    body BLOB, size_bytes INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL DEFAULT 0);
INSERT INTO presence VALUES ('p', 'd', 'present', 1, 1.0);
INSERT INTO entries VALUES ('p', 'main', 'k', x'00', 1.0);
INSERT INTO publications VALUES (1, 'projects/p/scopes/main/k.json', 'p', 1.0);
INSERT INTO publications VALUES (2, 'projects/p/blobs/sha256/x', 'p', 1.0);
INSERT INTO upload_items VALUES (1, 1, 0, 'p', 'o', 'd', NULL, 1, 0, 0);
INSERT INTO upload_items VALUES (2, 2, 0, 'p', 'o', 'd', NULL, 1, 0, 0);
PRAGMA user_version = 1;
"""


async def test_an_index_of_the_first_version_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    connection.close()
    for _ in range(2):
        async with CacheDatabase(path) as database:
            rows = await database.run(
                lambda db: [
                    db.execute("SELECT COUNT(*) FROM presence").fetchone()[0],
                    db.execute("SELECT id FROM publications").fetchall(),
                    db.execute("SELECT id FROM upload_items").fetchall(),
                    db.execute("SELECT COUNT(*) FROM contributions").fetchone()[0],
                    db.execute("SELECT COUNT(*) FROM uses").fetchone()[0],
                ]
            )
            assert rows == [1, [(2,)], [(2,)], 0, 0]
    assert not path.with_suffix(".damaged").exists()


@pytest.mark.parametrize("damage", ["PRAGMA user_version = 99", None])
async def test_an_index_that_cannot_be_read_is_moved_aside(
    tmp_path: Path, damage: str | None
) -> None:
    path = tmp_path / "index.db"
    if damage is None:
        path.write_bytes(b"no database" * 1000)
    else:
        connection = sqlite3.connect(path)
        connection.execute(damage)
        connection.close()
    async with CacheDatabase(path) as database:
        await database.run(lambda db: db.execute("SELECT * FROM contributions").fetchall())
    assert path.with_suffix(".damaged").exists()


async def test_a_whole_index_that_cannot_be_opened_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with CacheDatabase(path) as database:
        await database.run(
            lambda db: db.execute("INSERT INTO publications VALUES (7, 'n', 'p', 1.0)")
        )
    blocked = tmp_path / "index.db-wal"
    blocked.mkdir()  # SQLite cannot open it, as when the disk has no room
    with pytest.raises(InternalError, match="cannot be opened now"):
        await CacheDatabase(path).__aenter__()
    blocked.rmdir()
    async with CacheDatabase(path) as database:
        rows = await database.run(lambda db: db.execute("SELECT id FROM publications").fetchall())
    assert rows == [(7,)]
