"""The contributions that a node knows, in its index."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Sequence

    from offload_cache.contributions import Contribution
    from offload_cache.database import CacheDatabase

MAX_PER_SCOPE = 200
_MAX_PER_PROJECT = 5_000


@dataclass(frozen=True, slots=True)
class Member:
    """A contribution of a scope, without its records.

    Attributes:
        contribution_id: its name; newer ones come first in key order.
        key: of the builds that it is for.
        created_at: seconds since the epoch.
        listed: whether it was seen in the shared store.
    """

    contribution_id: str
    key: str
    created_at: float
    listed: bool


class ScopeTable:
    """One project's rows, each method in one transaction."""

    def __init__(self, database: CacheDatabase, project_id: str) -> None:
        self._database = database
        self._project_id = project_id
        self._read: OrderedDict[str, None] = OrderedDict()

    async def members(self, scope: str) -> list[Member]:
        """Return the newest contributions of a scope, newest first."""
        self._read[scope] = None
        self._read.move_to_end(scope)
        if len(self._read) > _MAX_PER_PROJECT:
            self._read.popitem(last=False)
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT id, key, created_at, listed FROM contributions"
                " WHERE project = ? AND scope = ? ORDER BY id LIMIT ?",
                (self._project_id, scope, MAX_PER_SCOPE),
            ).fetchall()
        )
        return [Member(name, key, at, bool(listed)) for name, key, at, listed in rows]

    async def scopes(self) -> list[str]:
        """Return the scopes that this node knows contributions of."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT DISTINCT scope FROM contributions WHERE project = ? ORDER BY scope",
                (self._project_id,),
            ).fetchall()
        )
        return [row[0] for row in rows]

    async def add(self, documents: Sequence[tuple[Contribution, bytes]], *, listed: bool) -> None:
        """Keep contributions with their documents.

        When there are too many, the oldest of the scope go, or the scopes that were not read for
        longest.
        """
        project_id = self._project_id
        rows = [
            (project_id, c.scope, c.contribution_id, c.key, c.created_at.timestamp(), listed, body)
            for c, body in documents
        ]
        scopes = {contribution.scope for contribution, _ in documents}
        read = {scope: number for number, scope in enumerate(self._read, 1)}

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT INTO contributions"
                " (project, scope, id, key, created_at, listed, document)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " listed = MAX(listed, excluded.listed)",
                rows,
            )
            for scope in scopes:
                connection.execute(
                    "DELETE FROM contributions WHERE project = ?1 AND scope = ?2 AND id > (SELECT"
                    " id FROM contributions WHERE project = ?1 AND scope = ?2"
                    " ORDER BY id LIMIT 1 OFFSET ?3)",
                    (project_id, scope, MAX_PER_SCOPE - 1),
                )
            found = connection.execute(
                "SELECT scope, COUNT(*), MAX(created_at) FROM contributions WHERE project = ?"
                " GROUP BY scope",
                (project_id,),
            ).fetchall()
            total = sum(count for _, count, _ in found)
            # Scopes that builds follow would only be read again.
            found.sort(key=lambda row: (read.get(row[0], 0), row[2]))
            for scope, count, _ in found:
                if total <= _MAX_PER_PROJECT:
                    break
                if scope not in scopes:
                    connection.execute(
                        "DELETE FROM contributions WHERE project = ? AND scope = ?",
                        (project_id, scope),
                    )
                    total -= count

        await self._database.run(work)

    async def set_publication(self, scope: str, contribution_id: str, publication: int) -> None:
        """Note under which number the upload queue has a contribution."""
        await self._database.run(
            lambda connection: connection.execute(
                "UPDATE contributions SET publication = ?"
                " WHERE project = ? AND scope = ? AND id = ?",
                (publication, self._project_id, scope, contribution_id),
            )
        )

    async def publication(self, scope: str, contribution_id: str) -> int | None:
        """Return the number under which a contribution still waits for its upload."""
        row = await self._database.run(
            lambda connection: connection.execute(
                "SELECT publications.id FROM contributions JOIN publications"
                " ON publications.id = contributions.publication"
                " WHERE contributions.project = ? AND scope = ? AND contributions.id = ?",
                (self._project_id, scope, contribution_id),
            ).fetchone()
        )
        return None if row is None else int(row[0])

    async def waiting(self, scope: str) -> set[str]:
        """Return the contributions of a scope that are not in the shared store yet."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT contributions.id FROM contributions JOIN publications"
                " ON publications.id = contributions.publication"
                " WHERE contributions.project = ? AND scope = ?",
                (self._project_id, scope),
            ).fetchall()
        )
        return {row[0] for row in rows}

    async def documents(self, scope: str, names: Sequence[str]) -> dict[str, bytes]:
        """Return documents by identifier; those that are not here are left out."""

        def work(connection: sqlite3.Connection) -> dict[str, bytes]:
            found: dict[str, bytes] = {}
            for name in names:
                row = connection.execute(
                    "SELECT document FROM contributions WHERE project = ? AND scope = ? AND id = ?",
                    (self._project_id, scope, name),
                ).fetchone()
                if row is not None:
                    found[name] = row[0]
            return found

        return await self._database.run(work)

    async def remove(self, scope: str, names: Collection[str]) -> None:
        """Forget contributions."""
        rows = [(self._project_id, scope, name) for name in names]
        await self._database.run(
            lambda connection: connection.executemany(
                "DELETE FROM contributions WHERE project = ? AND scope = ? AND id = ?", rows
            )
        )

    async def set_listed(self, scope: str, names: Iterable[str]) -> None:
        """Note that contributions were seen in the shared store."""
        rows = [(self._project_id, scope, name) for name in names]
        await self._database.run(
            lambda connection: connection.executemany(
                "UPDATE contributions SET listed = 1 WHERE project = ? AND scope = ? AND id = ?",
                rows,
            )
        )

    async def uses(self, scope: str) -> dict[str, float]:
        """Return when each key of a scope was last of use, in seconds since the epoch."""
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT key, used_at FROM uses WHERE project = ? AND scope = ?",
                (self._project_id, scope),
            ).fetchall()
        )
        return dict(rows)

    async def note_uses(self, scope: str, uses: Iterable[tuple[str, float]]) -> None:
        """Remember uses; those of more than a year ago are forgotten."""
        rows = [(self._project_id, scope, key, used_at) for key, used_at in uses]
        oldest = time.time() - 366 * 86400

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT INTO uses VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " used_at = MAX(used_at, excluded.used_at)",
                rows,
            )
            connection.execute(
                "DELETE FROM uses WHERE project = ? AND used_at < ?", (self._project_id, oldest)
            )

        await self._database.run(work)
