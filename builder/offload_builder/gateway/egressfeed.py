"""Takes egress policies from the database to the nodes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import OffloadError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.gateway.egresspolicies import EgressPolicies
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""How soon nodes hear of a policy that a command has applied on the gateway's machine."""


class EgressFeed:
    """Tells nodes what builds may reach: when they attach, and at every change."""

    def __init__(self, policies: EgressPolicies, nodes: NodeRegistry) -> None:
        self._policies = policies
        self._nodes = nodes
        self._told: dict[str, int] = {}
        self._listeners: list[Callable[[], Awaitable[None]]] = []

    def on_change(self, listener: Callable[[], Awaitable[None]]) -> None:
        """Call a listener after every change that nodes were told of."""
        self._listeners.append(listener)

    async def greet(self, node: AttachedNode) -> None:
        """Tell one node that has just attached."""
        node.post(await self._message())

    def newest(self) -> dict[str, int]:
        """Return the newest versions by scope, as nodes were told last."""
        return dict(self._told)

    async def refresh(self) -> None:
        """Tell all nodes, if something is new.

        Raises:
            OffloadError: the database cannot be read.
        """
        versions = await self._policies.versions_now()
        if versions == self._told:
            return
        message = await self._message()
        self._told = {item.project_id: item.version for item in message.egress_policies.policies}
        told = [node.node_id for node in self._nodes.connected() if node.post(message)]
        log.info("egress.policies.sent", policies=len(versions), nodes=told)
        for listener in self._listeners:
            await listener()

    async def run(self) -> None:
        """Refresh now and then, for changes of other processes, until cancelled."""
        while True:
            try:
                await self.refresh()
            except OffloadError as error:
                log.error("egress.policies.unreadable", exc_info=error)
            await asyncio.sleep(POLL_SECONDS)

    async def _message(self) -> nodes_pb.AttachResponse:
        message = nodes_pb.EgressPolicies()
        for item in (await self._policies.current()).values():
            message.policies.add(
                project_id=item.scope, version=item.version, file=item.file, text=item.text
            )
        return nodes_pb.AttachResponse(egress_policies=message)
