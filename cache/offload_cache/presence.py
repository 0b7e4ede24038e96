"""What this node knows about blobs in the shared store, so that it need not ask each time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable

    from offload_cache.database import CacheDatabase


class BlobState(Enum):
    """What was found last."""

    PRESENT = "present"
    """It was uploaded, seen, or is named by an entry that is written after its blobs."""
    ABSENT = "absent"
    """The store had no such object when it was asked."""
    LOST = "lost"
    """A read proved that the object is gone or corrupt although it should be there."""
    UNREACHABLE = "unreachable"
    """A read failed because the store did not answer."""


_LIFETIME_SECONDS = {
    BlobState.PRESENT: 6 * 3600.0,
    BlobState.ABSENT: 20.0,
    BlobState.LOST: 3600.0,
    BlobState.UNREACHABLE: 10.0,
}

_MAX_FACTS = 200_000  # about 40 MB; beyond it faded facts are dropped at once
_CLEAN_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Known:
    """One remembered fact; `checked_at` is seconds since the epoch."""

    state: BlobState
    size_bytes: int
    checked_at: float


class Presence:
    """Remembered facts of one project: in memory, with PRESENT and LOST also in the index.

    A fact fades after a time that depends on its kind; the shortest is that of "not there", which
    another node may change at any moment.
    """

    def __init__(
        self, database: CacheDatabase, project_id: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._project_id = project_id
        self._clock = clock
        self._known: dict[str, Known] = {}
        self._cleaned_at = clock()

    async def load(self) -> None:
        """Read what earlier runs knew and forget what has faded."""
        project_id, now = self._project_id, self._clock()

        def work(connection: sqlite3.Connection) -> list[tuple[str, str, int, float]]:
            self._delete_faded(connection, now)
            return connection.execute(
                "SELECT digest, state, size_bytes, checked_at FROM presence WHERE project = ?",
                (project_id,),
            ).fetchall()

        for digest, state, size_bytes, checked_at in await self._database.run(work):
            self._known[digest] = Known(BlobState(state), size_bytes, checked_at)

    def get(self, digest: str, *, max_age_seconds: float | None = None) -> Known | None:
        """Return what is known and neither faded nor older than `max_age_seconds`."""
        known = self._known.get(digest)
        if known is None:
            return None
        age = self._clock() - known.checked_at
        if age > _LIFETIME_SECONDS[known.state]:
            del self._known[digest]
            return None
        return None if max_age_seconds is not None and age > max_age_seconds else known

    def is_present(self, digest: str) -> bool:
        """Whether the shared store is known to have the blob."""
        known = self.get(digest)
        return known is not None and known.state is BlobState.PRESENT

    async def note(self, digest: str, state: BlobState, size_bytes: int = 0) -> None:
        """Remember what was just found."""
        await self._note_all([(digest, size_bytes)], state)

    async def trust(self, blobs: Iterable[tuple[str, int]], *, since: float) -> None:
        """Count blobs of an entry written at `since` as present, unless a later read disproved it.

        Facts that are past half of their life are noted anew, so that those who trust blobs more
        often than that never see one fade.

        Args:
            blobs: digests with their sizes in bytes.
            since: seconds since the epoch.
        """
        new = []
        half = self._clock() - _LIFETIME_SECONDS[BlobState.PRESENT] / 2
        for digest, size_bytes in blobs:
            known = self.get(digest)
            present = known is not None and known.state is BlobState.PRESENT
            if known is None or known.checked_at < (max(since, half) if present else since):
                new.append((digest, size_bytes))
        if new:
            await self._note_all(new, BlobState.PRESENT)

    async def _note_all(self, blobs: list[tuple[str, int]], state: BlobState) -> None:
        now = self._clock()
        cleaning = len(self._known) > _MAX_FACTS or now - self._cleaned_at > _CLEAN_SECONDS
        if cleaning:
            self._cleaned_at = now
            self._known = {
                digest: known
                for digest, known in self._known.items()
                if now - known.checked_at <= _LIFETIME_SECONDS[known.state]
            }
        for digest, size_bytes in blobs:
            self._known[digest] = Known(state, size_bytes, now)
        if state not in {BlobState.PRESENT, BlobState.LOST}:
            return
        rows = [
            (self._project_id, digest, state.value, size_bytes, now) for digest, size_bytes in blobs
        ]

        def work(connection: sqlite3.Connection) -> None:
            if cleaning:
                self._delete_faded(connection, now)
            connection.executemany("INSERT OR REPLACE INTO presence VALUES (?, ?, ?, ?, ?)", rows)

        await self._database.run(work)

    def _delete_faded(self, connection: sqlite3.Connection, now: float) -> None:
        connection.execute(
            "DELETE FROM presence WHERE project = ? AND checked_at < ?",
            (self._project_id, now - max(_LIFETIME_SECONDS.values())),
        )
