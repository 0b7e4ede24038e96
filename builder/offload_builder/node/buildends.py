"""What follows the end of a build: it is reported, kept, and its cache is exported."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.buildlogs import BuildLogs, build_update
from offload_builder.node.departure import AWAY
from offload_builder.node.exportturns import ExportTurns, builds_crowd
from offload_builder.node.imagekeeping import ImageKeeping
from offload_builder.node.outcomes import interrupted
from offload_core.aio import TaskSet
from offload_core.errors import NodeLostError
from offload_proto.v1.builds_service_pb2 import BuildState

if TYPE_CHECKING:
    from offload_builder.node.endedbuilds import EndedBuilds
    from offload_builder.node.gatewaylink import GatewayLink
    from offload_builder.node.job import BuildJob
    from offload_builder.node.slots import Slots
    from offload_cache.nodestore import NodeStore
    from offload_proto.v1.node_service_pb2 import Result

log = structlog.get_logger(__name__)

CONCLUDE_SECONDS = 2.0


def task_failed(name: str, error: BaseException) -> None:
    """Log what ended a task in the background."""
    log.error("background.failed", task=name, exc_info=error)


class BuildEnds:
    """Does what is left to do when builds end, and when their clients leave.

    Args:
        slots: of the node.
        ended: the builds that are kept.
        store: of all projects.
        link: to the gateway.
        background: of the node, for what is not worth waiting for when it stops.
        exports: how many caches are exported at once.
    """

    def __init__(
        self,
        slots: Slots,
        ended: EndedBuilds,
        store: NodeStore,
        link: GatewayLink,
        background: TaskSet,
        exports: int,
    ) -> None:
        self._slots = slots
        self._ended = ended
        self._store = store
        self._link = link
        self._background = background
        self._logs = BuildLogs(link)
        self._keeping = ImageKeeping(store, ended, link)
        self._exports = ExportTurns(exports, self._crowded)
        self._publishing = TaskSet(task_failed)
        self._concluding = TaskSet(task_failed)

    async def close(self) -> None:
        """Cancel what is still under way."""
        await self._concluding.close()
        await self._publishing.close()

    async def take_up(self) -> None:
        """Go on with what a former process of the node left."""
        for left in await self._ended.restore():
            self._background.start(
                self._logs.send_late(left, self._ended), name=f"late.{left.build_id}"
            )
        self._background.start(self._keeping.confirm_left(), name="images.saved")
        self._background.start(self._ended.run(self._in_use), name="builds.ended")

    def _crowded(self) -> bool:
        return not self._slots.draining and builds_crowd(self._slots.busy)

    def _in_use(self, build_id: str) -> bool:
        return build_id in self._slots.builds or self._logs.is_sending(build_id)

    def sweep(self) -> None:
        """Release builds that were kept for long enough."""
        self._ended.sweep(self._in_use)

    def changed(self) -> None:
        """Hear that builds have come or gone."""
        self._link.beat()
        self._exports.look()

    async def send_log(self, job: BuildJob) -> None:
        """Send the log of a build while it runs and after its end."""
        try:
            await self._logs.send(job, self._ended)
        finally:
            self.sweep()

    def finished(self, job: BuildJob, result: Result | None, reason: str) -> None:
        """Report the end of a build, give back its slot, publish its cache in the background.

        The first call counts.
        """
        build = self._slots.builds.get(job.build_id)
        if build is None or build.over:
            return
        build.over = True
        self.changed()
        publish = False
        if result is None:
            result, ending = interrupted(reason, job.stats)
        elif result.HasField("success"):
            publish = job.will_publish()
            ending = (BuildState.BUILD_STATE_SUCCEEDED, "")
        else:
            ending = (BuildState.BUILD_STATE_FAILED, result.failure.message)
        job.ending = ending
        job.conclude(result)
        self._ended.keep(job, result, *ending)
        self._concluding.start(self._conclude(job, *ending), name=f"conclude.{job.build_id}")
        log.info("build.finished", build_id=job.build_id, publish=publish, reason=reason)
        if publish:
            job.publishing.clear()
            self._publishing.start(self._publish(job), name=f"publish.{job.build_id}")
        else:
            self._background.start(job.release_key(), name=f"release-key.{job.build_id}")

    async def _conclude(self, job: BuildJob, state: BuildState.ValueType, error: str) -> None:
        """Report the end after the log, so that who follows the log sees all of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONCLUDE_SECONDS):
                await job.log_sent.wait()
        self._link.report(build_update(job, state, error))
        await job.save_record()
        if (saved := self._ended.unsaved(job.build_id)) is not None:
            self._publishing.start(self._keeping.confirm(saved), name=f"save.{job.build_id}")

    async def _publish(self, job: BuildJob) -> None:
        try:
            try:
                async with self._exports.turn(job.hurry):
                    publications = await job.export_cache()
            finally:
                # What follows needs neither BuildKit nor anything else that the job holds.
                job.publishing.set()
            if publications is not None:
                await job.cache.confirm_published(publications)
        finally:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                await job.log_sent.wait()
            self._link.report(build_update(job, BuildState.BUILD_STATE_SUCCEEDED))

    def release(self, job: BuildJob) -> None:
        """Let go of a build that has ended; what it holds goes when its cache is exported."""
        job.lose(NodeLostError(AWAY))
        self.forget(job.build_id)
        self.sweep()
        self._background.start(self._close(job), name=f"close.{job.build_id}")

    def forget(self, build_id: str) -> None:
        """Let go of a build that is not here any more."""
        self._slots.forget(build_id)
        self.changed()

    async def _close(self, job: BuildJob) -> None:
        try:
            if job.ending is not None and job.stats.returned_bytes:
                # What the client fetched after the end belongs to the numbers of the build.
                await job.log_sent.wait()
                self._link.report(build_update(job, *job.ending))
            await job.publishing.wait()
        finally:
            await job.close()

    # When the node stops.

    async def published(self) -> None:
        """Wait for cache exports; for uploads only if the shared store takes them."""
        while not await self._publishing.drain(1.0):
            objects = self._store.objects
            away = objects is None or not objects.reachable
            if away and self._exports.open == 0:
                return  # the upload queue is durable and goes on after the next start

    async def concluded(self, timeout: float) -> None:
        """Wait until the ends of builds were reported, at most `timeout` seconds."""
        await self._concluding.drain(timeout)
