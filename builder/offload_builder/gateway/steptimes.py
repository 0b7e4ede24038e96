"""How long steps took when they last ran, so that a hit in the cache can be given in time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from offload_builder.gateway import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.gateway.store import Store
    from offload_proto.v1.nodes_service_pb2 import StepTime

MAX_STEPS_PER_UPDATE = 1000
MAX_STEPS_PER_PROJECT = 5000
_KEY_CHARACTERS = 32
_LONGEST_MILLISECONDS = 30 * 86_400_000


class StepTimes:
    """A bounded table per project; the steps that ran longest ago are forgotten first."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def note(self, project_id: str, steps: Sequence[StepTime]) -> int:
        """Remember the steps that ran; return the milliseconds that the cached ones once took.

        Noting the same steps again changes nothing and returns the same.
        """
        # A node may repeat a key; a database refuses it in one statement.
        known = {step.key[:_KEY_CHARACTERS]: step for step in steps[:MAX_STEPS_PER_UPDATE]}
        ran = {
            key: min(max(0, step.milliseconds), _LONGEST_MILLISECONDS)
            for key, step in known.items()
            if not step.cached
        }
        cached = [key for key, step in known.items() if step.cached]
        now = datetime.now(UTC)
        table = schema.step_times

        def work(db: sa.Connection) -> int:
            mine = table.c.project_id == project_id
            if ran:
                db.execute(table.delete().where(mine, table.c.step_key.in_(list(ran))))
                db.execute(
                    table.insert(),
                    [
                        {"project_id": project_id, "step_key": key, "milliseconds": value,
                         "ran_at": now}
                        for key, value in ran.items()
                    ],
                )  # fmt: skip
                count = db.scalar(sa.select(sa.func.count()).where(mine).select_from(table)) or 0
                if count > MAX_STEPS_PER_PROJECT:
                    oldest = (
                        sa.select(table.c.step_key)
                        .where(mine)
                        .order_by(table.c.ran_at)
                        .limit(count - MAX_STEPS_PER_PROJECT)
                    )
                    db.execute(table.delete().where(mine, table.c.step_key.in_(oldest)))
            if not cached:
                return 0
            total = sa.select(sa.func.sum(table.c.milliseconds))
            return int(db.scalar(total.where(mine, table.c.step_key.in_(cached))) or 0)

        return await self._store.write(work)
