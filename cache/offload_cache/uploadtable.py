"""The rows of the upload queue in the node's index."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from offload_cache.keys import blob_key

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence

    from offload_cache.database import CacheDatabase

_UNKNOWN = -1  # size of a blob


@dataclass(frozen=True, slots=True)
class UploadItem:
    """One object to write: a blob of the project's disk store, or a small body.

    Attributes:
        stage: items of a lower stage are uploaded before.
        object_key: where it goes.
        digest: the blob, None for a body.
        body: the bytes, None for a blob.
        size_bytes: of either; None for a blob that is not on this node's disk.
    """

    stage: int
    object_key: str
    digest: str | None
    body: bytes | None
    size_bytes: int | None

    @classmethod
    def for_blob(cls, project_id: str, stage: int, digest: str, size_bytes: int | None) -> Self:
        """Return the item that sees to a blob: it is uploaded where the store has none."""
        return cls(stage, blob_key(project_id, digest), digest, None, size_bytes)

    @classmethod
    def for_document(cls, stage: int, object_key: str, body: bytes) -> Self:
        """Return the item that writes a document."""
        return cls(stage, object_key, None, body, len(body))


@dataclass(frozen=True, slots=True)
class QueuedUpload:
    """One waiting item as the queue handles it; `attempts` counts failures of its own."""

    id: int
    publication: int
    project: str
    object_key: str
    digest: str | None
    body: bytes | None
    size_bytes: int | None
    attempts: int


class UploadTable:
    """Reads and writes of the queue, each in one transaction."""

    def __init__(self, database: CacheDatabase) -> None:
        self._database = database

    async def add(
        self, name: str, project_id: str, items: Sequence[UploadItem], limit: int
    ) -> tuple[int, list[int]]:
        """Store a publication; return its number and those that it made superfluous.

        Beyond `limit` publications the oldest are given up, so that an outage cannot fill the disk.
        """

        def work(connection: sqlite3.Connection) -> tuple[int, list[int]]:
            number = connection.execute(
                "INSERT INTO publications (name, project, created_at) VALUES (?, ?, ?)",
                (name, project_id, time.time()),
            ).lastrowid
            if number is None:
                raise RuntimeError("SQLite gave no row id")
            connection.executemany(
                "INSERT INTO upload_items (publication, stage, project, object_key, digest, body,"
                " size_bytes) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        number, i.stage, project_id, i.object_key, i.digest, i.body,
                        _UNKNOWN if i.size_bytes is None else i.size_bytes,
                    )
                    for i in items
                ],
            )  # fmt: skip
            dropped = connection.execute(
                "SELECT id FROM publications WHERE name = ?1 AND id != ?2 AND id !="
                " (SELECT MIN(id) FROM publications WHERE name = ?1)"
                " UNION SELECT id FROM (SELECT id FROM publications ORDER BY id DESC"
                " LIMIT -1 OFFSET ?3)",
                (name, number, limit),
            ).fetchall()
            connection.executemany("DELETE FROM publications WHERE id = ?", dropped)
            return number, [row[0] for row in dropped]

        return await self._database.run(work)

    async def drop_excess(
        self, project_id: str, max_bytes: int, patience_seconds: float
    ) -> list[int]:
        """Remove the oldest publications whose blobs are too many, and return them.

        Those younger than `patience_seconds` and the newest stay, whatever they have. A blob that
        several name counts once, for the newest of them.
        """

        def work(connection: sqlite3.Connection) -> list[int]:
            total = connection.execute(
                "SELECT SUM(bytes) FROM (SELECT MAX(size_bytes) AS bytes FROM upload_items"
                " WHERE project = ? AND digest IS NOT NULL AND size_bytes > 0 GROUP BY digest)",
                (project_id,),
            ).fetchone()[0]
            if (total or 0) <= max_bytes:
                return []
            # Each publication with the bytes that it and all newer ones keep on the disk.
            rows = connection.execute(
                "SELECT publication, SUM(SUM(bytes)) OVER (ORDER BY publication DESC)"
                " FROM (SELECT MAX(publication) AS publication, MAX(size_bytes) AS bytes"
                " FROM upload_items WHERE project = ? AND digest IS NOT NULL AND size_bytes > 0"
                " GROUP BY digest) GROUP BY publication ORDER BY publication DESC",
                (project_id,),
            ).fetchall()
            full_at = next((number for number, kept in rows[1:] if kept > max_bytes), -1)
            gone = connection.execute(
                "SELECT id FROM publications WHERE project = ? AND id <= ? AND created_at < ?",
                (project_id, full_at, time.time() - patience_seconds),
            ).fetchall()
            connection.executemany("DELETE FROM publications WHERE id = ?", gone)
            return [row[0] for row in gone]

        return await self._database.run(work)

    async def is_pending(self, publication: int) -> bool:
        """Whether a publication still waits for an upload."""
        return await self._database.run(
            lambda connection: (
                connection.execute(
                    "SELECT 1 FROM publications WHERE id = ?", (publication,)
                ).fetchone()
                is not None
            )
        )

    async def pending_digests(self, project_id: str) -> set[str]:
        """Return the blobs of a project that wait for their upload, or may have to again."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT DISTINCT digest FROM upload_items WHERE project = ? AND digest IS NOT NULL",
                (project_id,),
            ).fetchall()
        )
        return {row[0] for row in rows}

    async def count(self, project_id: str = "") -> int:
        """Return how many items wait, of one project or of all."""
        row = await self._database.run(
            lambda connection: connection.execute(
                "SELECT COUNT(*) FROM upload_items WHERE NOT done AND ?1 IN ('', project)",
                (project_id,),
            ).fetchone()
        )
        return int(row[0])

    async def keys(self, publication: int) -> set[str]:
        """Return the keys of all objects of a publication."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT object_key FROM upload_items WHERE publication = ?", (publication,)
            ).fetchall()
        )
        return {row[0] for row in rows}

    async def due(self, running: Collection[str], limit: int) -> tuple[list[QueuedUpload], float]:
        """Return at most `limit` items to start now, none of a key in `running`.

        The second value is in how many seconds the next postponed item is due.
        """
        busy = set(running)

        def work(connection: sqlite3.Connection) -> tuple[list[QueuedUpload], float]:
            now = time.time()
            found: list[QueuedUpload] = []
            taken = set(busy)
            rows = connection.execute(
                "SELECT id, publication, project, object_key, digest, body,"
                " NULLIF(size_bytes, -1), attempts"
                " FROM upload_items AS item WHERE NOT done AND due_at <= ? AND stage ="
                " (SELECT MIN(stage) FROM upload_items"
                " WHERE publication = item.publication AND NOT done) ORDER BY id LIMIT ?",
                (now, limit + 4 * len(busy)),
            )
            for row in rows:
                item = QueuedUpload(*row)
                if item.object_key not in taken and len(found) < limit:
                    taken.add(item.object_key)
                    found.append(item)
            later = connection.execute(
                "SELECT MIN(due_at) FROM upload_items WHERE due_at > ? AND NOT done", (now,)
            ).fetchone()[0]
            return found, (later - now if later is not None else float("inf"))

        return await self._database.run(work)

    async def postpone(self, item_id: int, seconds: float) -> None:
        """Count a failed attempt and let the item wait."""
        await self._database.run(
            lambda connection: connection.execute(
                "UPDATE upload_items SET attempts = attempts + 1, due_at = ? WHERE id = ?",
                (time.time() + seconds, item_id),
            )
        )

    async def delay(self, publication: int, seconds: float) -> None:
        """Let a whole publication wait; no attempt has failed."""
        await self._database.run(
            lambda connection: connection.execute(
                "UPDATE upload_items SET due_at = ? WHERE publication = ? AND NOT done",
                (time.time() + seconds, publication),
            )
        )

    async def digests(self, publication: int) -> list[str]:
        """Return all blobs that a publication relies upon."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT DISTINCT digest FROM upload_items WHERE publication = ?"
                " AND digest IS NOT NULL",
                (publication,),
            ).fetchall()
        )
        return [row[0] for row in rows]

    async def restart(self, publication: int | None = None) -> bool:
        """Count nothing of a publication, or of any, as done; False when nothing was."""
        return await self._database.run(
            lambda connection: (
                connection.execute(
                    "UPDATE upload_items SET done = 0"
                    " WHERE done AND (publication = ?1 OR ?1 IS NULL)",
                    (publication,),
                ).rowcount
                > 0
            )
        )

    async def done(self, item: QueuedUpload) -> tuple[list[int], list[int]]:
        """Note a finished item; return the publications it completed and those it replaced.

        Items stay until their publication is complete: it may have to begin again. A document
        replaces the older ones of its name, which must not overwrite it later.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[int], list[int]]:
            connection.execute("UPDATE upload_items SET done = 1 WHERE id = ?", (item.id,))
            finished = connection.execute(
                "SELECT id, name FROM publications WHERE id = ?1 AND NOT EXISTS"
                " (SELECT 1 FROM upload_items WHERE publication = ?1 AND NOT done)",
                (item.publication,),
            ).fetchall()
            replaced: list[int] = []
            for number, name in finished:
                rows = connection.execute(
                    "SELECT id FROM publications WHERE name = ? AND id < ?", (name, number)
                ).fetchall()
                replaced.extend(row[0] for row in rows)
                connection.execute(
                    "DELETE FROM publications WHERE name = ? AND id <= ?", (name, number)
                )
            done = [row[0] for row in finished]
            return done, [number for number in replaced if number not in done]

        return await self._database.run(work)

    async def remove(self, publication: int) -> None:
        """Give a publication up, with all its items."""
        await self._database.run(
            lambda connection: connection.execute(
                "DELETE FROM publications WHERE id = ?", (publication,)
            )
        )
