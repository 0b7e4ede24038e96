"""What the layer cache brought to the builds of a project, from their history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import cache_service_pb2 as cache_pb

if TYPE_CHECKING:
    from offload_builder.gateway.store import Store

PERIOD = timedelta(days=30)
MAX_BUILDS = 20_000
"""The newest of the period that are looked at, so that the answer takes a part of a second."""


async def cache_gain(store: Store, project_id: str) -> cache_pb.CacheGain:
    """Return what the cache brought to a project in the last `PERIOD`."""
    table = schema.builds
    query = (
        sa.select(table.c.stats)
        .where(
            table.c.project_id == project_id,
            table.c.created_at >= datetime.now(UTC) - PERIOD,
            table.c.state == builds_pb.BUILD_STATE_SUCCEEDED,
        )
        .order_by(table.c.created_at.desc())
        .limit(MAX_BUILDS)
    )

    def work(db: sa.Connection) -> cache_pb.CacheGain:
        gain = cache_pb.CacheGain()
        saved = 0
        for data in db.scalars(query):
            stats = builds_pb.BuildStats.FromString(data)
            gain.builds += 1
            gain.steps_total += stats.steps_total
            gain.steps_cached += stats.steps_cached
            saved += stats.saved_milliseconds
        gain.period.FromTimedelta(PERIOD)
        gain.saved.FromMilliseconds(saved)
        return gain

    return await store.read(work)
