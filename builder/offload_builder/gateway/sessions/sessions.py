"""All of sessions at a gateway, put together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.sessions.active import ActiveSessions
from offload_builder.gateway.sessions.cost import Rates
from offload_builder.gateway.sessions.ending import SessionEnding
from offload_builder.gateway.sessions.queue import SessionQueue
from offload_builder.gateway.sessions.table import SessionRecord, SessionsTable
from offload_builder.gateway.sessions.tracking import SessionTracking

if TYPE_CHECKING:
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.platforms import PoolPlatforms
    from offload_builder.gateway.store import Store
    from offload_core.aio import TaskSet

log = structlog.get_logger(__name__)


class Sessions:
    """The parts, and what several of them need. Belongs to the event loop.

    Attributes:
        table: sessions in the database.
        active: those that have not ended.
        queue: those that wait.
        ending: ends them.
        tracking: hears from nodes.
    """

    def __init__(
        self,
        config: GatewayConfig,
        store: Store,
        nodes: NodeRegistry,
        platforms: PoolPlatforms,
        members: Members,
    ) -> None:
        self._retention = config.session_retention
        self.table = SessionsTable(store)
        self.active = ActiveSessions(self.table)
        self.ending = SessionEnding(self.active, nodes, members)
        rates = Rates.of(config)
        self.queue = SessionQueue(
            config, self.active, nodes, platforms, rates, self.ending.stop_soon
        )
        self.active.listen(self.queue.wake)
        self.tracking = SessionTracking(self.active, self.queue, self.ending, config.restart_grace)
        nodes.listen(self.tracking)

    def start(self, tasks: TaskSet) -> None:
        """Run what runs beside the services."""
        tasks.start(self.queue.run(), name="session-queue")
        tasks.start(self.ending.run(), name="session-ending")

    async def find(self, session_id: str) -> SessionRecord | None:
        """Return a session, ended ones too, or None."""
        active = self.active.find(session_id)
        return active.record if active is not None else await self.table.find(session_id)

    def newest(self, record: SessionRecord) -> SessionRecord:
        """Return what is known now of a session that was read from the table."""
        active = self.active.find(record.session_id)
        return active.record if active is not None else record

    def used_milliseconds(self, record: SessionRecord) -> int:
        """Return the time of a session that counts until now."""
        active = self.active.find(record.session_id)
        return active.used_milliseconds() if active is not None else record.used_milliseconds

    async def forget_old(self) -> None:
        """Delete sessions that ended long ago."""
        if self._retention:
            limit = datetime.now(UTC) - timedelta(seconds=self._retention)
            if count := await self.table.forget_ended(limit):
                log.info("sessions.pruned", sessions=count)
