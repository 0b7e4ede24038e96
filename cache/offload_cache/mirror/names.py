"""What names of base images meant when an upstream registry was last asked; kept in the index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from offload_cache.database import CacheDatabase

_TABLE = """
CREATE TABLE IF NOT EXISTS base_images (
    project TEXT NOT NULL, repository TEXT NOT NULL, reference TEXT NOT NULL,
    digest TEXT NOT NULL, checked_at REAL NOT NULL, noted_at REAL NOT NULL,
    PRIMARY KEY (project, repository, reference)) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class KnownName:
    """A tag or digest of a repository that the pool could read.

    Attributes:
        repository: with its host, for example "docker.io/library/alpine".
        reference: a tag or a digest.
        digest: of the manifest.
        checked_at: when the registry said so, seconds since the epoch.
        noted_at: when its document in the shared store was last written; 0 for never.
    """

    repository: str
    reference: str
    digest: str
    checked_at: float
    noted_at: float = 0.0

    @property
    def name(self) -> str:
        """The whole name, as in a Dockerfile."""
        separator = "@" if self.reference == self.digest else ":"
        return f"{self.repository}{separator}{self.reference}"


class NameTable:
    """One project's names."""

    def __init__(self, database: CacheDatabase, project_id: str) -> None:
        self._database = database
        self._project_id = project_id

    async def open(self) -> None:
        """Make the table where it is missing."""
        await self._database.run(lambda connection: connection.execute(_TABLE))

    async def get(self, repository: str, reference: str) -> KnownName | None:
        """Return what is known of a name."""
        row = await self._database.run(
            lambda connection: connection.execute(
                "SELECT digest, checked_at, noted_at FROM base_images"
                " WHERE project = ? AND repository = ? AND reference = ?",
                (self._project_id, repository, reference),
            ).fetchone()
        )
        return KnownName(repository, reference, *row) if row is not None else None

    async def of_repository(self, repository: str, limit: int) -> list[KnownName]:
        """Return names of a repository, last checked ones first."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT reference, digest, checked_at, noted_at FROM base_images"
                " WHERE project = ? AND repository = ? ORDER BY checked_at DESC LIMIT ?",
                (self._project_id, repository, limit),
            ).fetchall()
        )
        return [KnownName(repository, *row) for row in rows]

    async def put(self, known: KnownName) -> None:
        """Keep what a registry said."""
        await self._database.run(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO base_images VALUES (?, ?, ?, ?, ?, ?)",
                (
                    self._project_id,
                    known.repository,
                    known.reference,
                    known.digest,
                    known.checked_at,
                    known.noted_at,
                ),
            )
        )

    async def note(self, known: KnownName, noted_at: float) -> None:
        """Keep when a name's document was written; nothing happens when the name has moved."""
        await self._database.run(
            lambda connection: connection.execute(
                "UPDATE base_images SET noted_at = ? WHERE project = ? AND repository = ?"
                " AND reference = ? AND digest = ?",
                (noted_at, self._project_id, known.repository, known.reference, known.digest),
            )
        )

    async def forget(self, repository: str, reference: str | None = None) -> None:
        """Drop a name, or all names of a repository."""

        def work(connection: sqlite3.Connection) -> None:
            where = "project = ? AND repository = ?"
            values: tuple[str, ...] = (self._project_id, repository)
            if reference is not None:
                where += " AND reference = ?"
                values += (reference,)
            connection.execute(f"DELETE FROM base_images WHERE {where}", values)  # noqa: S608

        await self._database.run(work)

    async def expire(self, before: float) -> None:
        """Drop the names that were last checked before a time."""
        await self._database.run(
            lambda connection: connection.execute(
                "DELETE FROM base_images WHERE project = ? AND checked_at < ?",
                (self._project_id, before),
            )
        )
