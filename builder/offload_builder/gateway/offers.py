"""Offers: asking one node whether it takes one build."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_core.aio import TaskSet
from offload_core.units import format_duration
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.gateway.active_builds import ActiveBuild, ActiveBuilds
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.nodes import AttachedNode

log = structlog.get_logger(__name__)

DECLINE_SECONDS = 1.0
"""For how long a node that declined a build is not asked again for it, unless it changes."""


class Offers:
    """The questions that are open. Belongs to the event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        builds: ActiveBuilds,
        wake: Callable[[], None],
        accepted: Callable[[ActiveBuild, AttachedNode], bool],
    ) -> None:
        """Set who looks at the queue again, and who takes an acceptance or returns False."""
        self._config = config
        self._builds = builds
        self._wake = wake
        self._accepted = accepted
        self._tasks = TaskSet(self._failed)

    def make(self, build: ActiveBuild, node: AttachedNode) -> None:
        """Ask a node; the slot counts as taken until it answers."""
        self._builds.ask(build, node.node_id)
        self._tasks.start(self._offer(build, node), name=f"offer-{build.build_id}")

    async def close(self) -> None:
        """Give up on all answers."""
        await self._tasks.close()

    async def _offer(self, build: ActiveBuild, node: AttachedNode) -> None:
        reply = await self._ask(build, node)
        if reply.accepted:
            if self._accepted(build, node):
                return
            node.cancel_build(build.build_id, "the build has left the queue")
        else:
            self._decline(build, node, reply.reason or "it gave no reason")
        if build.queued:
            # Otherwise it has ended meanwhile and its slot was counted back there.
            self._builds.unask(build)

    async def _ask(self, build: ActiveBuild, node: AttachedNode) -> nodes_pb.OfferReply:
        answer: asyncio.Future[nodes_pb.OfferReply] = asyncio.get_running_loop().create_future()
        node.offers[build.build_id] = answer
        offer = nodes_pb.Offer(build_id=build.build_id, project_id=build.record.project_id)
        offer.hold.FromMilliseconds(round(self._config.slot_hold * 1000))
        try:
            if not node.post(nodes_pb.AttachResponse(offer=offer)):
                return nodes_pb.OfferReply(reason="the connection to the node broke")
            async with asyncio.timeout(self._config.offer_timeout):
                return await answer
        except TimeoutError:
            limit = format_duration(self._config.offer_timeout)
            # If it accepts later, its answer finds no offer and the slot is given back.
            return nodes_pb.OfferReply(reason=f"it did not answer within {limit}")
        finally:
            if node.offers.get(build.build_id) is answer:
                del node.offers[build.build_id]

    def _decline(self, build: ActiveBuild, node: AttachedNode, reason: str) -> None:
        log.info("offer.declined", build_id=build.build_id, node_id=node.node_id, reason=reason)
        build.declined[node.node_id] = reason
        loop = asyncio.get_running_loop()
        loop.call_later(DECLINE_SECONDS, self._forget_decline, build, node.node_id)

    def _forget_decline(self, build: ActiveBuild, node_id: str) -> None:
        if build.declined.pop(node_id, None) is not None:
            self._wake()

    def _failed(self, name: str, error: BaseException) -> None:
        log.error("offer.failed", offer=name, exc_info=error)
        build = self._builds.find(name.removeprefix("offer-"))
        if build is not None and build.queued and build.asked_node:
            self._builds.unask(build)
