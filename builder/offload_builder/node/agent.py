"""The node agent: slots, running builds, and everything they share."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.buildlogs import BuildLogs, build_update
from offload_builder.node.cachedesk import CacheDesk
from offload_builder.node.cachetasks import CacheTasks
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.departure import AWAY, ClientSeat
from offload_builder.node.endedbuilds import EndedBuild, EndedBuilds
from offload_builder.node.exportturns import ExportTurns, builds_crowd
from offload_builder.node.faults import storage_error
from offload_builder.node.gatewaylink import GatewayLink
from offload_builder.node.imagekeeping import ImageKeeping
from offload_builder.node.job import BuildJob
from offload_builder.node.outcomes import STOPPING, interrupted
from offload_builder.node.projectlimits import LimitBook
from offload_builder.node.projectpool import ProjectPool
from offload_builder.node.registries import Registries
from offload_builder.node.savedimages import SavedImages
from offload_builder.node.steprights import StepRights
from offload_builder.node.tickets import TicketVerifier
from offload_cache.collection.collector import Collector
from offload_cache.collection.loop import CollectionLoop
from offload_cache.collection.plan import Limits
from offload_cache.mirror.upstream import origin_address
from offload_cache.nodebounds import NodeBounds
from offload_cache.nodestore import NodeStore
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_cache.s3store import S3Store
from offload_cache.statistics import CacheStatistics
from offload_core import VERSION
from offload_core.aio import TaskSet, finish
from offload_core.errors import NodeLostError, NotFoundError, OffloadError, QueueTimeoutError
from offload_core.trust import join_address, split_address
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.node_service_pb2 import Failure, Result
from offload_proto.v1.nodes_service_pb2 import BuildUpdate, Heartbeat, Hello

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from offload_builder.node.config import NodeConfig
    from offload_builder.node.enrolment import NodeIdentity
    from offload_cache.mirror.connection import Endpoint
    from offload_proto.v1.builds_service_pb2 import Ticket
    from offload_proto.v1.node_service_pb2 import Start
    from offload_proto.v1.nodes_service_pb2 import CacheTask, CacheTaskReply, ProjectLimits

log = structlog.get_logger(__name__)

CANCEL_SECONDS = 10.0
CONCLUDE_SECONDS = 2.0
LEAVE_SECONDS = 5.0
"""After a drain: for cancelled builds to tell their clients, and for the last news to be sent."""
MIN_DISK_FREE_BYTES = 512 << 20


@dataclass
class _Running:
    """A build that is here, from its ticket until its client has left."""

    job: BuildJob | None = None
    """None while its project is being opened."""
    task: asyncio.Task[Result] | None = None
    canceled: str = ""
    over: bool = False
    """It has ended and its slot is free; the client may still fetch the image."""


class NodeAgent:
    """Owns the node's state; the gRPC services and the gateway link call it."""

    def __init__(self, config: NodeConfig, identity: NodeIdentity) -> None:
        self.config = config
        self.identity = identity
        self.tickets = TicketVerifier(identity.node_id)
        self.registry = Registry()
        self.link = GatewayLink(config.gateway_address(), identity.keys, self)
        self.statistics = CacheStatistics()
        self._listening = config.listen
        self._builds: dict[str, _Running] = {}
        self._reserved: dict[str, float] = {}
        self._logs = BuildLogs(self.link)
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._background = TaskSet(self._crashed)
        self._working = TaskSet(self._crashed)
        self._publishing = TaskSet(self._crashed)
        self._concluding = TaskSet(self._crashed)
        # As many exports as builds; more would only slow each other down, and the next builds.
        self._exports = ExportTurns(config.slots, self._crowded)
        self.limits = LimitBook(config.data / "limits.json")
        self.cache_desk = CacheDesk()
        self._stack = AsyncExitStack()
        self._store: NodeStore
        self._bounds: NodeBounds
        self._registry_server: RegistryServer
        self._registries: Registries
        self.ended: EndedBuilds
        self.saved: SavedImages
        self._keeping: ImageKeeping
        self._projects: ProjectPool

    async def __aenter__(self) -> Self:
        registries = self._registries = Registries(self.config.registry_config)
        objects = None
        if self.config.s3_endpoint:
            objects = S3Store(self.config.shared_store(), statistics=self.statistics)
        async with AsyncExitStack() as stack:
            self._store = await stack.enter_async_context(
                NodeStore(
                    self.config.data / "cache",
                    objects=objects,
                    max_project_bytes=self.config.blobs_keep,
                    statistics=self.statistics,
                    holder=self.identity.node_id,
                )
            )
            self.saved = SavedImages(self.tickets, self._store)
            self._bounds = NodeBounds(
                self._store,
                keep_bytes=self.config.blobs_keep_all,
                idle_seconds=self.config.blobs_idle,
            )
            self.limits.on_change(self._limits_changed)
            self._limits_changed()
            if objects is not None:
                await stack.enter_async_context(self._collection(objects))
            mirrors = await stack.enter_async_context(
                registries.mirrors(self.config, self._store.database)
            )
            self._registry_server = await stack.enter_async_context(
                RegistryServer(self.registry, self.statistics, extra=mirrors.routes())
            )
            self._projects = await stack.enter_async_context(
                ProjectPool(
                    self.config,
                    self._store,
                    partial(registries.serve, mirrors, self._registry_server.address),
                )
            )
            self.ended = EndedBuilds(
                self.config.data / "journals",
                self._store,
                keep_seconds=self.config.ended_keep,
                keep_builds=self.config.ended_keep_builds,
                keep_bytes=self.config.blobs_keep // 2,
            )
            stack.callback(self.ended.close)
            stack.push_async_callback(self._background.close)
            stack.push_async_callback(self._working.close)
            stack.push_async_callback(self._publishing.close)
            stack.push_async_callback(self._concluding.close)
            self._background.start(self._projects.reap(), name="projects.reap")
            self._background.start(self._bounds.run(), name="node.bounds")
            self._background.start(self._projects.survey.run(self.link.beat), name="platforms")
            for left in await self.ended.restore():
                self._background.start(
                    self._logs.send_late(left, self.ended), name=f"late.{left.build_id}"
                )
            self._keeping = ImageKeeping(self._store, self.ended, self.link)
            self._background.start(self._keeping.confirm_left(), name="images.saved")
            self._background.start(self.ended.run(self._in_use), name="builds.ended")
            CacheTasks(
                self.identity.node_id,
                self.config,
                self._store,
                self._projects,
                self._bounds,
                lambda project_id: self._shared_limits(project_id).keep_bytes,
            ).register(self.cache_desk)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _collection(self, objects: S3Store) -> CollectionLoop:
        config = self.config
        collector = Collector(
            objects,
            self.identity.node_id,
            self._shared_limits,
            pool_keep_bytes=config.cache_shared_pool_keep,
            grace_seconds=config.cache_grace,
        )
        return CollectionLoop(objects, collector, config.cache_collect_every)

    def _shared_limits(self, project_id: str) -> Limits:
        """Return what a project may keep in the shared store: its own bounds, else this node's."""
        own, config = self.limits.of(project_id), self.config
        return Limits(
            keep_bytes=own.shared_keep_bytes or config.cache_shared_keep,
            idle_seconds=own.shared_idle_seconds or config.cache_shared_idle,
            context_keep_bytes=config.context_shared_keep,
            context_idle_seconds=config.context_shared_idle,
        )

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        log.error("background.failed", task=name, exc_info=error)

    # What the gateway asks (gatewaylink.NodeState).

    def hello(self) -> Hello:
        """Introduce the node."""
        return Hello(
            endpoints=[self._with_port(address) for address in self.config.advertise],
            relay_endpoint=self.config.relay_address or self._listening,
            platforms=self.config.native_platforms(),
            slots=self.config.slots,
            version=VERSION,
            buildkit_version="",
            running_build_ids=[key for key, found in self._builds.items() if not found.over],
        )

    def _with_port(self, address: str) -> str:
        """Return an advertised address; port 0 stands for the one that the node listens on."""
        host, port = split_address(address)
        return address if port else join_address(host, split_address(self._listening)[1])

    def heartbeat(self) -> Heartbeat:
        """Describe the node now."""
        free = shutil.disk_usage(self.config.data).free
        health = self._store.shared_problem
        if free < MIN_DISK_FREE_BYTES:
            health = f"only {free >> 20} MiB are free on the disk"
        return Heartbeat(
            running=self._busy(),
            draining=self._draining,
            disk_free_bytes=free,
            health=health,
            platforms=self._projects.survey.found,
        )

    def _busy(self) -> int:
        return sum(not running.over for running in self._builds.values())

    def _crowded(self) -> bool:
        return not self._draining and builds_crowd(self._busy())

    def trust_gateway(self, ticket_key_pem: bytes) -> None:
        """Take the gateway's ticket key."""
        self.tickets.trust(ticket_key_pem)

    def expect_projects(self, project_ids: Sequence[str]) -> None:
        """Start the BuildKits of a few projects, so that their first builds need not wait."""
        for project_id in project_ids[: self.config.warm_projects]:
            self._background.start(self._warm_up(project_id), name=f"warm-up.{project_id}")

    def offer(self, build_id: str, project_id: str, hold_seconds: float) -> str:
        """Reserve a slot for a build; return why not, or an empty text."""
        now = time.monotonic()
        self._reserved = {key: until for key, until in self._reserved.items() if until > now}
        if self._draining:
            return "the node is draining"
        if build_id in self._builds:
            return "the build is at this node already"
        others = len(self._reserved) - (build_id in self._reserved)
        if self._busy() + others >= self.config.slots:
            return "all slots of the node are taken"
        self._reserved[build_id] = now + hold_seconds
        log.debug("build.reserved", build_id=build_id, project_id=project_id)
        # While the client is on its way here.
        self._background.start(self._warm_up(project_id), name=f"warm-up.{build_id}")
        return ""

    def limit_projects(self, limits: ProjectLimits) -> None:
        """Take the bounds of all projects that have some."""
        self.limits.take(limits)

    def _limits_changed(self) -> None:
        self._store.set_bounds(self.limits.node_bounds())

    async def cache_task(self, task: CacheTask) -> CacheTaskReply:
        """Do work on the layer cache; what goes wrong is in the answer."""
        return await self.cache_desk.answer(task)

    async def _warm_up(self, project_id: str) -> None:
        with contextlib.suppress(OffloadError, OSError, sqlite3.Error):
            runtime = await self._projects.likely_runtime(project_id)
            runtime.cache.offers.expect()
            await runtime.warm_up()

    def cancel(self, build_id: str, reason: str) -> None:
        """End a build or give back its slot."""
        self._reserved.pop(build_id, None)
        running = self._builds.get(build_id)
        if running is not None and not running.canceled:
            running.canceled = reason or "canceled"
            if running.task is not None:
                running.task.cancel()

    # What clients ask.

    def listening(self, address: str) -> None:
        """Note the address that the service got."""
        self._listening = address

    async def admit(self, start: Start, *, member: str) -> BuildJob:
        """Redeem a ticket and start the build.

        Raises:
            AccessDeniedError: the ticket is not valid.
            QueueTimeoutError: the client came too late, its slot was given away.
            NodeLostError: the node is about to stop, or cannot open the project.
            QuotaExceededError: the disk is full.
        """
        ticket = self.tickets.redeem(start.ticket, member=member)
        if self._draining:
            raise NodeLostError("the node is shutting down; start the build again")
        if self._reserved.pop(ticket.build_id, None) is None:
            raise QueueTimeoutError(
                "this build came too late to its node, its slot was given away; "
                "start the build again"
            )
        # From here on the slot is this build's, whatever happens while its project is opened.
        running = self._builds[ticket.build_id] = _Running()
        self._empty.clear()
        try:
            job = running.job = await self._open(ticket, start)
        except BaseException as error:
            self._forget(ticket.build_id)
            self.ended.drop(ticket.build_id)
            state, reason = BuildState.BUILD_STATE_FAILED, str(error)
            if isinstance(error, asyncio.CancelledError):
                state, reason = BuildState.BUILD_STATE_CANCELED, AWAY
            self.link.report(BuildUpdate(build_id=ticket.build_id, state=state, error=reason))
            raise
        self.link.beat()
        self._background.start(self._send_log(job), name=f"log.{job.build_id}")
        log.info(
            "build.started",
            build_id=job.build_id,
            project_id=ticket.project_id,
            member=member,
            trust_domain=ticket.trust_domain,
            # Their names only, for who asks later which build had what.
            given=[*start.spec.secret_ids, *(f"ssh:{name}" for name in start.spec.ssh_ids)],
            entitlements=list(start.spec.entitlements),
        )
        self._report(job, BuildState.BUILD_STATE_RUNNING)
        self._working.start(self._work(job), name=f"build.{job.build_id}")
        return job

    async def _open(self, ticket: Ticket, start: Start) -> BuildJob:
        try:
            runtime = await self._projects.runtime(ticket.project_id, ticket.trust_domain)
        except (OSError, sqlite3.Error) as error:
            raise storage_error("open the project", error) from error
        # Refused before anything is opened for it.
        rights = StepRights(start.spec, ticket, runtime.policy)
        link = ClientLink()
        job = BuildJob(
            ticket,
            start,
            runtime,
            self.registry,
            self._registry_server.address,
            link,
            self.ended.journal(ticket.build_id, ticket.project_id, ticket.member),
            rights,
        )
        job.seat = ClientSeat(
            job.build_id,
            link,
            job.needs,
            self.config.rejoin_wait,
            partial(self.cancel, job.build_id),
            job.repeated,
            detached=start.detach,
        )
        return job

    def job(self, build_id: str, *, member: str) -> BuildJob:
        """Return a build that is here and whose client has not left after its end.

        Raises:
            NotFoundError: there is none, or it belongs to somebody else.
        """
        running = self._builds.get(build_id)
        if running is None or running.job is None or running.job.member != member:
            raise NotFoundError(f"there is no build {build_id} of yours on this node")
        return running.job

    def find(self, build_id: str, *, member: str | None) -> BuildJob | EndedBuild:
        """Return a build that is here, or is kept after its end.

        Args:
            build_id: the build.
            member: who started it; None for anybody.

        Raises:
            NotFoundError: there is none, or it belongs to somebody else.
        """
        running = self._builds.get(build_id)
        found = running.job if running is not None else self.ended.find(build_id)
        if found is None or member not in (None, found.member):
            raise NotFoundError(
                f"there is no build {build_id} of yours on this node, or it ended too long ago"
            )
        return found

    def registry_endpoint(self, host: str) -> Endpoint:
        """Return where and how a registry is reached, by its name in image names."""
        return self._registries.reach(origin_address(host))

    async def _work(self, job: BuildJob) -> None:
        """Run a build to its end, whoever looks on."""
        try:
            result, reason = await self.execute(job)
            self.finished(job, result, reason)
        except asyncio.CancelledError:
            self.finished(job, None, STOPPING)
            raise
        except BaseException:
            failure = Failure(kind=Failure.KIND_NODE, message="the node failed; its log says more")
            self.finished(job, Result(failure=failure), "")
            raise
        finally:
            self.visited(job)

    def visited(self, build: BuildJob | EndedBuild) -> None:
        """Hear that a call of a client has ended; after the end of a build the last one counts."""
        running = self._builds.get(build.build_id)
        if running is None:
            # It is kept for clients that come back, or was until now.
            self._sweep()
        elif isinstance(build, BuildJob) and running.over and build.seat.empty:
            self.release(build)

    def _in_use(self, build_id: str) -> bool:
        return build_id in self._builds or self._logs.is_sending(build_id)

    def _sweep(self) -> None:
        self.ended.sweep(self._in_use)

    async def execute(self, job: BuildJob) -> tuple[Result | None, str]:
        """Run a build; return its result, or None and why it was cancelled."""
        running = self._builds[job.build_id]
        if running.canceled:
            return None, running.canceled
        work = asyncio.ensure_future(job.run())
        running.task = work
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError:
            # The node stops.
            work.cancel()
            await finish(asyncio.wait((work,)), CANCEL_SECONDS)
            raise
        if work.cancelled():
            return None, running.canceled or "the build was interrupted at the node"
        return work.result(), ""

    def finished(self, job: BuildJob, result: Result | None, reason: str) -> None:
        """Report the end of a build, give back its slot, publish its cache in the background.

        The first call counts.
        """
        running = self._builds.get(job.build_id)
        if running is None or running.over:
            return
        running.over = True
        self._builds_changed()
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
        self.ended.keep(job, result, *ending)
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
        self._report(job, state, error=error)
        await job.save_record()
        if (saved := self.ended.unsaved(job.build_id)) is not None:
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
                await job.confirm_published(publications)
        finally:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                await job.log_sent.wait()
            self._report(job, BuildState.BUILD_STATE_SUCCEEDED)

    def release(self, job: BuildJob) -> None:
        """Let go of a build that has ended; what it holds goes when its cache is exported."""
        job.lose(NodeLostError(AWAY))
        self._forget(job.build_id)
        self._sweep()
        self._background.start(self._close(job), name=f"close.{job.build_id}")

    def _forget(self, build_id: str) -> None:
        self._builds.pop(build_id, None)
        if not self._builds:
            self._empty.set()
        self._builds_changed()

    def _builds_changed(self) -> None:
        self.link.beat()
        self._exports.look()

    async def _close(self, job: BuildJob) -> None:
        try:
            if job.ending is not None and job.stats.returned_bytes:
                # What the client fetched after the end belongs to the numbers of the build.
                await job.log_sent.wait()
                self._report(job, job.ending[0], error=job.ending[1])
            await job.publishing.wait()
        finally:
            await job.close()

    async def _send_log(self, job: BuildJob) -> None:
        try:
            await self._logs.send(job, self.ended)
        finally:
            self._sweep()

    def _report(self, job: BuildJob, state: BuildState.ValueType, *, error: str = "") -> None:
        self.link.report(build_update(job, state, error))

    async def drain(self) -> None:
        """Accept nothing more; wait for running builds and for the cache of finished ones.

        What has not ended after `drain_timeout` is cancelled; its clients and the gateway hear it.
        """
        self._draining = True
        self._reserved.clear()
        self._builds_changed()
        log.info("node.draining", builds=len(self._builds))
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                await self._empty.wait()
                await self._published()
        except TimeoutError:
            log.warning("node.drain.timed_out", builds=len(self._builds))
        for build_id in list(self._builds):
            self.cancel(build_id, STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._empty.wait()
        await self._concluding.drain(LEAVE_SECONDS)
        await self.link.flush(LEAVE_SECONDS)
        log.info("node.drained")

    async def _published(self) -> None:
        """Wait for cache exports; for uploads only if the shared store takes them."""
        while not await self._publishing.drain(1.0):
            objects = self._store.objects
            away = objects is None or not objects.reachable
            if away and self._exports.open == 0:
                return  # the upload queue is durable and goes on after the next start
