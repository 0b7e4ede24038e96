"""Policies learned from builds of the history."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from offload_builder.egress.policy.learn import learn
from offload_builder.gateway import schema
from offload_builder.gateway.networkuses import NetworkUses, SeenUse, attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from offload_builder.gateway.log_book import LogBook
    from offload_builder.gateway.store import Store

MAX_BUILDS = 500
"""Builds from which one policy is learned."""
FOLLOW_SECONDS, QUIET_SECONDS = 30.0, 2.0
"""A build that has not ended, as far as is known, is read on while it tells something."""
_PARTS = 50


@dataclass(frozen=True)
class Learned:
    """What builds did in the network.

    Attributes:
        uses: what was refused, then what was reached, build by build.
        builds: how many were read.
    """

    uses: list[SeenUse]
    builds: int

    def proposal(self, *, with_refused: bool = False) -> str:
        """Return a policy, TOML, that allows what was reached.

        Args:
            with_refused: and what was refused, where no rule denies it.
        """
        reached, refused = attempts(item.use for item in self.uses)
        return learn(reached, refused, with_refused=with_refused)


class EgressLearning:
    """Reads the records of builds.

    Args:
        store: has the history.
        logs: of the builds.
        ended: whether a build is over, as far as it is known; what runs is waited for a little.
    """

    def __init__(
        self, store: Store, logs: LogBook, ended: Callable[[str], bool] = lambda _: True
    ) -> None:
        self._store = store
        self._logs = logs
        self._ended = ended

    async def of_builds(self, build_ids: Iterable[str], *, follow: bool = False) -> Learned:
        """Read builds; those that do not exist have done nothing.

        Args:
            build_ids: whole ids.
            follow: wait, a little, for builds that are about to end.
        """
        uses: list[SeenUse] = []
        count = 0
        for build_id in dict.fromkeys(build_ids):
            uses += await self._read(build_id, follow=follow)
            count += 1
        return Learned(uses, count)

    async def _read(self, build_id: str, *, follow: bool) -> list[SeenUse]:
        found = NetworkUses(build_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FOLLOW_SECONDS
        read = self._logs.read(
            build_id, after=0, follow=follow, ended=lambda: self._ended(build_id)
        )
        async with aclosing(read) as runs:
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                while True:
                    # The last news of a build may be on its way still.
                    seconds = min(QUIET_SECONDS, deadline - loop.time()) if follow else None
                    async with asyncio.timeout(seconds):
                        run = await anext(runs)
                    for batch in run:
                        found.take(batch)
        return found.all()

    async def parts(self, group_id: str, project_id: str) -> list[str]:
        """Return the builds that are parts of one image."""
        table = schema.builds
        query = (
            sa.select(table.c.build_id)
            .where(table.c.group_id == group_id, table.c.project_id == project_id)
            .order_by(table.c.created_at.desc())
            .limit(_PARTS)
        )
        return await self._store.read(lambda db: list(db.scalars(query)))

    async def recent(
        self, project_ids: Sequence[str], since: datetime | None, limit: int = MAX_BUILDS
    ) -> list[str]:
        """Return the newest builds.

        Args:
            project_ids: of these projects; empty for all.
            since: made after that; None for any time.
            limit: how many at most.
        """
        table = schema.builds
        query = sa.select(table.c.build_id).order_by(table.c.created_at.desc()).limit(limit)
        if project_ids:
            query = query.where(table.c.project_id.in_(project_ids))
        if since is not None:
            query = query.where(table.c.created_at >= since)
        return await self._store.read(lambda db: list(db.scalars(query)))
