"""How long the output of ended builds is kept: by age, and by the bytes of all of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa
import structlog
import zstandard

from offload_builder.gateway import schema
from offload_builder.gateway.history import FINAL_STATES
from offload_core.units import format_size
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import events_pb2 as events_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

GONE = b"the output of this build is no longer kept"
"""What is replayed instead of removed output, as a warning."""

_SWEEP_BUILDS = 50


class _Kept(NamedTuple):
    build_id: str
    ended_at: datetime
    size_bytes: int
    """As stored."""


class LogRetention:
    """Removes output that is too old or too much; the builds stay in the history."""

    def __init__(self, store: Store, *, keep_bytes: int, retention_seconds: float) -> None:
        """Set the bounds.

        Args:
            store: of the gateway.
            keep_bytes: compressed output of all builds together; 0 for no bound.
            retention_seconds: after the end of a build; 0 for no bound.
        """
        self._store = store
        self._keep_bytes = keep_bytes
        self._retention_seconds = retention_seconds

    async def sweep(self) -> int:
        """Remove what is beyond the bounds; return of how many builds.

        Raises:
            InternalError: the database failed.
        """
        if not (self._keep_bytes or self._retention_seconds):
            return 0
        total, ended = await self._store.read(_stored)
        limit = datetime.now(UTC) - timedelta(seconds=self._retention_seconds)
        surplus = total - self._keep_bytes if self._keep_bytes else 0
        gone: list[_Kept] = []
        for kept in ended:
            too_old = bool(self._retention_seconds) and kept.ended_at < limit
            if surplus <= 0 and not too_old:
                break
            gone.append(kept)
            surplus -= kept.size_bytes
        for start in range(0, len(gone), _SWEEP_BUILDS):
            # Small transactions, so that others get their turn in between.
            part = [kept.build_id for kept in gone[start : start + _SWEEP_BUILDS]]
            await self._store.write(partial(_remove, build_ids=part))
        if gone:
            size = format_size(sum(kept.size_bytes for kept in gone))
            log.info("history.logs.pruned", builds=len(gone), size=size)
        return len(gone)


def _stored(db: sa.Connection) -> tuple[int, list[_Kept]]:
    """Return the bytes of all output, and what is kept of ended builds, first ended first."""
    logs, builds = schema.build_logs, schema.builds
    stored = sa.func.sum(sa.func.length(logs.c.batches))
    total = int(db.scalar(sa.select(sa.func.coalesce(stored, 0))) or 0)
    query = (
        sa.select(logs.c.build_id, builds.c.completed_at, stored)
        .join(builds, builds.c.build_id == logs.c.build_id)
        .where(builds.c.state.in_(FINAL_STATES), builds.c.completed_at.is_not(None))
        .group_by(logs.c.build_id, builds.c.completed_at)
        # The mark that says that output was removed counts as nothing.
        .having(sa.func.sum(logs.c.size_bytes) > 0)
        .order_by(builds.c.completed_at, logs.c.build_id)
    )
    return total, [_Kept(row[0], row[1], int(row[2])) for row in db.execute(query)]


def _remove(db: sa.Connection, build_ids: Sequence[str]) -> None:
    table = schema.build_logs
    query = (
        sa.select(table.c.build_id, sa.func.max(table.c.last_sequence))
        .where(table.c.build_id.in_(build_ids))
        .group_by(table.c.build_id)
    )
    marks = [_mark(build_id, int(last)) for build_id, last in db.execute(query)]
    db.execute(table.delete().where(table.c.build_id.in_(build_ids)))
    if marks:
        db.execute(table.insert(), marks)


def _mark(build_id: str, last: int) -> dict[str, object]:
    """Return the row that stands for removed output; its number keeps late news of a node out."""
    batch = events_pb.ProgressBatch(sequence=last)
    batch.warnings.add(level=1, short=GONE)
    data = builds_pb.LogsResponse(batches=[batch]).SerializeToString()
    return {
        "build_id": build_id,
        "first_sequence": last,
        "last_sequence": last,
        "size_bytes": 0,
        "batches": zstandard.compress(data),
    }
