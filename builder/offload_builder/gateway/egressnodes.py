"""Which egress policies the nodes have in force, for commands beside the gateway.

The gateway hears it with the heartbeats and keeps it in its database. A row without a name says
when it last did so: where that is long ago, no gateway runs and nothing is known.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from offload_builder.gateway import schema
from offload_builder.gateway.plaintext import plain_line
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.5
TELL_SECONDS = 10.0
"""How often the gateway says that it is there."""
STALE_SECONDS = 30.0
"""After so long without a word of it no gateway runs."""
MAX_PROBLEM = 500
"""Characters that are kept of what a node says is wrong."""
_POLL_SECONDS = 0.2
_GATEWAY = ""


@dataclass(frozen=True)
class NodePolicies:
    """What one node has in force.

    Attributes:
        node_id: of the node.
        versions: by project, that of the pool under an empty name.
        problem: one sentence on why these are not the newest; empty for no reason.
    """

    node_id: str
    versions: Mapping[str, int]
    problem: str = ""

    def holds(self, scope: str, version: int) -> bool:
        """Return whether a version of one policy is in force; 0 is that of nobody."""
        return self.versions.get(scope, 0) == version

    def why_not(self, scope: str, version: int) -> str:
        """Return in one sentence why a version is not in force there; empty when it is."""
        if self.holds(scope, version):
            return ""
        held = self.versions.get(scope, 0)
        return self.problem or (f"it has version {held} still" if held else "it has none yet")


class EgressNodes:
    """Reads and keeps the list."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keep(self, nodes: NodeRegistry) -> None:
        """Write what the attached nodes say, soon after every change, until cancelled."""
        kept: list[NodePolicies] | None = None
        written_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            now = _attached(nodes)
            if now != kept or loop.time() - written_at > TELL_SECONDS:
                try:
                    await self._write(now)
                except OffloadError as error:
                    log.error("egress.nodes.unwritable", exc_info=error)
                else:
                    kept, written_at = now, loop.time()
            await asyncio.sleep(LOOK_SECONDS)

    async def _write(self, now: list[NodePolicies]) -> None:
        table = schema.egress_nodes
        rows = [
            {
                "node_id": item.node_id,
                "versions": json.dumps(dict(item.versions)),
                "problem": item.problem,
                "told_at": datetime.now(UTC),
            }
            for item in (NodePolicies(_GATEWAY, {}), *now)
        ]

        def work(db: sa.Connection) -> None:
            db.execute(table.delete())
            db.execute(table.insert(), rows)

        await self._store.write(work)

    async def read(self) -> list[NodePolicies] | None:
        """Return the attached nodes by name; None where no gateway runs."""
        table = schema.egress_nodes
        query = sa.select(table).order_by(table.c.node_id)
        rows = await self._store.read(lambda db: db.execute(query).all())
        limit = datetime.now(UTC) - timedelta(seconds=STALE_SECONDS)
        if not any(row.node_id == _GATEWAY and row.told_at > limit for row in rows):
            return None
        return [
            NodePolicies(row.node_id, json.loads(row.versions), row.problem)
            for row in rows
            if row.node_id != _GATEWAY
        ]

    async def wait(self, scope: str, version: int, seconds: float) -> list[NodePolicies] | None:
        """Wait, at most `seconds`, until all nodes have a version in force; return what they have.

        Returns:
            As `read`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # A node that has just attached is not in the list yet.
        settled = min(deadline, loop.time() + 2 * LOOK_SECONDS)
        while True:
            found = await self.read()
            if found is None or loop.time() >= deadline:
                return found
            done = all(item.holds(scope, version) for item in found)
            if done and (found or loop.time() >= settled):
                return found
            await asyncio.sleep(_POLL_SECONDS)


def _attached(nodes: NodeRegistry) -> list[NodePolicies]:
    return [
        NodePolicies(
            node.node_id,
            dict(node.heartbeat.egress_versions),
            plain_line(node.heartbeat.egress_problem, MAX_PROBLEM),
        )
        for node in sorted(nodes.connected(), key=lambda node: node.node_id)
    ]
