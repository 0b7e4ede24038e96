"""Bounds of the layer cache that an administrator sets per project, and how nodes hear of them."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from offload_builder.gateway import schema
from offload_core.errors import OffloadError, UsageError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

POLL_SECONDS = 5.0
"""How soon nodes hear of a change that a command wrote on the gateway's machine."""

_MAX_BOUND = 1 << 62


@dataclass(frozen=True)
class ProjectBounds:
    """Bounds of one project; 0 leaves a bound to the configuration of the nodes.

    Attributes:
        project_id: the project.
        shared_keep_bytes: of its objects in the shared store.
        shared_idle_seconds: how long an entry may be of no use to any build.
        node_keep_bytes: of its blobs on the disk of each node.
    """

    project_id: str
    shared_keep_bytes: int = 0
    shared_idle_seconds: int = 0
    node_keep_bytes: int = 0


class BoundsTable:
    """Bounds in the gateway's database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[str, ProjectBounds]:
        """Return the bounds of the projects that have some, by project."""
        query = sa.select(schema.project_bounds).order_by(schema.project_bounds.c.project_id)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return {row.project_id: ProjectBounds(**row._mapping) for row in rows}

    async def change(self, project_id: str, **bounds: int) -> ProjectBounds:
        """Set some bounds of a project that exists, leave the others, and return all of them.

        Raises:
            UsageError: a bound is negative or too large.
        """
        for name, value in bounds.items():
            if not 0 <= value < _MAX_BOUND:
                raise UsageError(f"{name} must not be negative, and not above {_MAX_BOUND}")
        table = schema.project_bounds

        def work(db: sa.Connection) -> ProjectBounds:
            row = db.execute(sa.select(table).where(table.c.project_id == project_id)).one_or_none()
            before = ProjectBounds(project_id) if row is None else ProjectBounds(**row._mapping)
            after = ProjectBounds(**{**dataclasses.asdict(before), **bounds})
            db.execute(table.delete().where(table.c.project_id == project_id))
            if after != ProjectBounds(project_id):
                db.execute(table.insert(), dataclasses.asdict(after))
            return after

        return await self._store.write(work)


class BoundsFeed:
    """Tells nodes about the bounds: when they attach, and at every change."""

    def __init__(self, table: BoundsTable, nodes: NodeRegistry) -> None:
        self._table = table
        self._nodes = nodes
        self._told: dict[str, ProjectBounds] = {}

    async def greet(self, node: AttachedNode) -> None:
        """Tell one node that has just attached."""
        bounds = await self._table.all()
        node.post(nodes_pb.AttachResponse(project_limits=limits_message(bounds)))

    async def run(self) -> None:
        """Tell all nodes about changes, also of other processes, until cancelled."""
        self._told = await self._table.all()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                bounds = await self._table.all()
            except OffloadError as error:
                log.error("project.bounds.unreadable", exc_info=error)
                continue
            if bounds != self._told:
                self._told = bounds
                message = nodes_pb.AttachResponse(project_limits=limits_message(bounds))
                told = [node.node_id for node in self._nodes.connected() if node.post(message)]
                log.info("project.bounds.changed", projects=len(bounds), nodes=told)


def limits_message(bounds: dict[str, ProjectBounds]) -> nodes_pb.ProjectLimits:
    """Return bounds as nodes get them."""
    message = nodes_pb.ProjectLimits()
    for item in bounds.values():
        limit = message.projects.add(
            project_id=item.project_id,
            shared_keep_bytes=item.shared_keep_bytes,
            node_keep_bytes=item.node_keep_bytes,
        )
        limit.shared_idle.FromSeconds(item.shared_idle_seconds)
    return message
