"""Logs and ends of builds on their way to the gateway, also those of a former process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.nodes_service_pb2 import BuildUpdate

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.endedbuilds import EndedBuild, EndedBuilds
    from offload_builder.node.gatewaylink import GatewayLink
    from offload_builder.node.job import BuildJob
    from offload_builder.node.journal import Journal

log = structlog.get_logger(__name__)

ENDED = (
    BuildState.BUILD_STATE_SUCCEEDED,
    BuildState.BUILD_STATE_FAILED,
    BuildState.BUILD_STATE_CANCELED,
)
LOG_SECONDS = 300.0
"""For so long the record of a build is kept for a gateway that is away."""


def build_update(job: BuildJob, state: BuildState.ValueType, error: str = "") -> BuildUpdate:
    """Return what the gateway is told of a build now."""
    return BuildUpdate(
        build_id=job.build_id,
        state=state,
        error=error,
        stats=job.stats,
        image_digest=job.image_digest,
        cache_state=job.cache.state,
        steps=job.step_times(),
        secret_ids=job.secrets.ids if state in ENDED else (),
    )


class BuildLogs:
    """Sends the journals of a node's builds."""

    def __init__(self, link: GatewayLink) -> None:
        self._link = link
        self._sending: set[str] = set()

    def is_sending(self, build_id: str) -> bool:
        """Return whether the gateway may not have the log of a build yet."""
        return build_id in self._sending

    async def send(self, job: BuildJob, kept: EndedBuilds) -> None:
        """Send the log of a build while it runs and after its end."""
        try:
            await self._send(job.build_id, job.journal, job.log_sent.set)
            kept.told(job.build_id)
        finally:
            job.log_sent.set()

    async def send_late(self, ended: EndedBuild, kept: EndedBuilds) -> None:
        """Send the log and the end of a build that a former process may have kept to itself."""
        record = ended.record
        await self._send(record.build_id, ended.journal, lambda: None)
        if record.state != BuildState.BUILD_STATE_LOST:
            # That a build is lost the gateway says itself when the node comes without it.
            self._link.report(
                BuildUpdate(
                    build_id=record.build_id,
                    state=BuildState.ValueType(record.state),
                    error=record.error,
                    image_digest=ended.image_digest,
                )
            )
        kept.told(record.build_id)

    async def _send(self, build_id: str, journal: Journal, give_up: Callable[[], None]) -> None:
        """Return when the gateway has a log.

        One that is away for long gets what is still there when it comes back; meanwhile nothing
        of the build is kept for it, and `give_up` says so to who waits.
        """
        self._sending.add(build_id)
        sending = asyncio.ensure_future(self._link.send_log(build_id, journal))
        try:
            await journal.finished.wait()
            sent, _ = await asyncio.wait((sending,), timeout=LOG_SECONDS)
            if not sent:
                log.warning("build.log.unsent", build_id=build_id)
                self._sending.discard(build_id)
                give_up()
            await sending
        finally:
            sending.cancel()
            self._sending.discard(build_id)
