"""The node agent: what the gateway and clients ask of the node, and everything builds share."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from offload_builder.egress.policy.ofbuild import read_build_policy
from offload_builder.node.apparmor import check_profile
from offload_builder.node.buildends import BuildEnds, task_failed
from offload_builder.node.buildgroups import remove_leftover_groups
from offload_builder.node.buildlogs import build_update
from offload_builder.node.cachedesk import CacheDesk
from offload_builder.node.cachetasks import CacheTasks
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.collecting import collection_loop, shared_limits
from offload_builder.node.departure import AWAY, ClientSeat
from offload_builder.node.devicesurvey import DeviceSurvey
from offload_builder.node.diskwatch import DiskWatch, Watched
from offload_builder.node.endedbuilds import EndedBuild, EndedBuilds
from offload_builder.node.faults import storage_error
from offload_builder.node.gatewaylink import GatewayLink
from offload_builder.node.isolation import Isolation
from offload_builder.node.job import BuildJob
from offload_builder.node.nodefacts import NodeFacts
from offload_builder.node.nodemetrics import NodeGauges
from offload_builder.node.outcomes import STOPPING
from offload_builder.node.projectlimits import LimitBook
from offload_builder.node.projectpool import ProjectPool
from offload_builder.node.registries import Registries
from offload_builder.node.savedimages import SavedImages
from offload_builder.node.sessions.models import SessionModels
from offload_builder.node.sessions.nodeimages import NodeImages
from offload_builder.node.sessions.nodesessions import REMOVE_SECONDS
from offload_builder.node.sessions.opening import open_sessions
from offload_builder.node.sessions.sync.desk import SyncDesk
from offload_builder.node.slots import Slots
from offload_builder.node.steprights import StepRights
from offload_builder.node.tickets import TicketVerifier
from offload_cache.mirror.upstream import origin_address
from offload_cache.nodebounds import NodeBounds
from offload_cache.nodestore import NodeStore
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_cache.s3store import S3Store
from offload_cache.statistics import CacheStatistics
from offload_core.aio import TaskSet, finish
from offload_core.errors import NotFoundError, OffloadError
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.node_service_pb2 import Failure, Result
from offload_proto.v1.nodes_service_pb2 import BuildUpdate, Heartbeat, Hello

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from offload_builder.egress.held import HeldPolicies
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.enrolment import NodeIdentity
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.sessions.nodesessions import NodeSessions
    from offload_cache.mirror.connection import Endpoint
    from offload_cache.mirror.handlers import Mirrors
    from offload_proto.v1.builds_service_pb2 import Ticket
    from offload_proto.v1.node_service_pb2 import Start
    from offload_proto.v1.nodes_service_pb2 import CacheTask, CacheTaskReply, ProjectLimits

log = structlog.get_logger(__name__)

CANCEL_SECONDS = 10.0
LEAVE_SECONDS = 5.0
"""After a drain: for cancelled builds to tell their clients, and for the last news to be sent."""

Job = TypeVar("Job", bound=BuildJob)


class NodeAgent:
    """Owns the node's state; the gRPC services and the gateway link call it."""

    def __init__(self, config: NodeConfig, identity: NodeIdentity, policies: HeldPolicies) -> None:
        self._policies = policies
        self.config = config
        self.identity = identity
        self.tickets = TicketVerifier(identity.node_id)
        self.registry = Registry()
        self.link = GatewayLink(config.gateway_address(), identity.keys, self)
        self.statistics = CacheStatistics()
        self.slots = Slots(config.slots)
        self.facts = NodeFacts(config, self.slots)
        self._background = TaskSet(task_failed)
        self._working = TaskSet(task_failed)
        self.limits = LimitBook(config.data / "limits.json")
        self.cache_desk = CacheDesk()
        self._devices = DeviceSurvey(config)
        self._stack = AsyncExitStack()
        self._store: NodeStore
        self._bounds: NodeBounds
        self._registry_server: RegistryServer
        self._registries: Registries
        self._mirrors: Mirrors
        self.ended: EndedBuilds
        self.saved: SavedImages
        self.isolation: Isolation
        self.copies: SyncDesk
        self.sessions: NodeSessions
        self._ends: BuildEnds
        self._projects: ProjectPool

    async def __aenter__(self) -> Self:
        check_profile(self.config.apparmor_profile)
        remove_leftover_groups(self.config.data / "projects")
        registries = self._registries = Registries(self.config.registry_config)
        shared = self.config.shared_store() if self.config.s3_endpoint else None
        objects = S3Store(shared, statistics=self.statistics) if shared is not None else None
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
            keep, idle = self.config.blobs_keep_all, self.config.blobs_idle
            self._bounds = NodeBounds(self._store, keep_bytes=keep, idle_seconds=idle)
            self.limits.on_change(self._limits_changed)
            self._limits_changed()
            if objects is not None:
                await stack.enter_async_context(
                    collection_loop(objects, self.config, self.limits, self.identity.node_id)
                )
            mirrors = self._mirrors = await stack.enter_async_context(
                registries.mirrors(self.config, self._store.database)
            )
            self._registry_server = await stack.enter_async_context(
                RegistryServer(self.registry, self.statistics, extra=mirrors.routes())
            )
            self.isolation = await stack.enter_async_context(
                Isolation(
                    self.config,
                    self._registry_server,
                    self._policies,
                    registries.settings,
                    self.link.post,
                )
            )
            self.facts.firewall = self.isolation.firewall is not None
            bases, place = partial(registries.serve, mirrors), self.isolation.place
            self._projects = await stack.enter_async_context(
                ProjectPool(self.config, self._store, bases, place)
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
            self._ends = BuildEnds(
                self.slots,
                self.ended,
                self._store,
                self.link,
                self._background,
                # As many as builds; more would only slow each other down, and the next builds.
                exports=self.config.slots,
            )
            stack.push_async_callback(self._ends.close)
            images = NodeImages(
                self._store,
                self.registry,
                self.slots,
                self.ended,
                registries,
                mirrors,
                self.isolation,
            )
            models = SessionModels(
                self._store,
                self.config.data / "session-models",
                node=self.identity.node_id,
                max_bytes=self.config.session_models_max,
            )
            self.copies = await stack.enter_async_context(SyncDesk())
            self.sessions = await stack.enter_async_context(
                open_sessions(
                    self.config,
                    self.isolation,
                    self._registry_server,
                    self.link,
                    images,
                    models,
                    self.copies,
                    registries.settings,
                    lambda: self._devices.found,
                )
            )
            self._background.start(self._projects.reap(), name="projects.reap")
            self._background.start(self._bounds.run(), name="node.bounds")
            watch = DiskWatch(self.config.data, self.config.disk_reserve, self._watched)
            self._background.start(watch.run(), name="disk.watch")
            self._background.start(self._projects.survey.run(self.link.beat), name="platforms")
            self._background.start(self._devices.run(self.link.beat), name="devices")
            await self._ends.take_up()
            CacheTasks(
                self.identity.node_id,
                self.config,
                self._store,
                self._projects,
                self._bounds,
                lambda project_id: shared_limits(self.config, self.limits, project_id).keep_bytes,
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

    # What the gateway asks (gatewaylink.NodeState).

    def hello(self) -> Hello:
        """Introduce the node."""
        hello = self.facts.hello()
        self.sessions.introduce(hello)
        return hello

    def heartbeat(self) -> Heartbeat:
        """Describe the node now."""
        refused, policies = self.isolation.why_refused(), self._policies.problem
        problems = (self._store.shared_problem, refused or policies)
        beat = self.facts.heartbeat(
            health="; ".join(filter(None, problems)),
            platforms=self._projects.survey.found,
            devices=self._devices.found,
        )
        beat.egress_problem = refused or policies
        if not refused:
            beat.egress_versions.update(self._policies.versions_in_force())
        self.sessions.describe(beat)
        return beat

    def gauges(self) -> NodeGauges:
        """Return what the node is, for its metrics."""
        return NodeGauges(
            versions=self._policies.versions_in_force,
            daemons=self._projects.daemons,
            builds=lambda: self.slots.busy,
            enforced=lambda: not (self.isolation.why_refused() or self._policies.problem),
        )

    def trust_gateway(self, ticket_key_pem: bytes) -> None:
        """Take the gateway's ticket key."""
        self.tickets.trust(ticket_key_pem)

    def expect_projects(self, project_ids: Sequence[str]) -> None:
        """Start the BuildKits of a few projects, so that their first builds need not wait."""
        for project_id in project_ids[: self.config.warm_projects]:
            self._background.start(self._warm_up(project_id), name=f"warm-up.{project_id}")

    def offer(self, build_id: str, project_id: str, hold_seconds: float) -> str:
        """Reserve a slot for a build; return why not, or an empty text."""
        refusal = self.isolation.why_refused() or self.slots.offer(build_id, hold_seconds)
        if refusal:
            return refusal
        log.debug("build.reserved", build_id=build_id, project_id=project_id)
        # While the client is on its way here.
        self._background.start(self._warm_up(project_id), name=f"warm-up.{build_id}")
        return ""

    def reserve(self, build_id: str) -> None:
        """Expect a build that shares the slot of another one of its client."""
        self.slots.reserve_beside(build_id)

    async def runtime(self, project_id: str, trust_domain: str) -> ProjectRuntime:
        """Return a trust domain of a project, for what is no build; see `ProjectPool.runtime`."""
        return await self._projects.runtime(project_id, trust_domain)

    async def context_store(self, project_id: str, trust_domain: str) -> ContextStore | None:
        """Return context files that people share; see `ProjectPool.context_store`."""
        return await self._projects.context_store(project_id, trust_domain)

    def limit_projects(self, limits: ProjectLimits) -> None:
        """Take the bounds of all projects that have some."""
        self.limits.take(limits)

    def _limits_changed(self) -> None:
        self._store.set_bounds(self.limits.node_bounds())

    async def cache_task(self, task: CacheTask) -> CacheTaskReply:
        """Do work on the layer cache; what goes wrong is in the answer."""
        return await self.cache_desk.answer(task)

    def _watched(self) -> list[Watched]:
        return [runtime.watched for runtime in self._projects.running()]

    async def _warm_up(self, project_id: str) -> None:
        with contextlib.suppress(OffloadError, OSError, sqlite3.Error):
            runtime = await self._projects.likely_runtime(project_id)
            runtime.cache.offers.expect()
            await runtime.warm_up()

    def cancel(self, build_id: str, reason: str) -> None:
        """End a build or give back its slot."""
        self.slots.give_back(build_id)
        build = self.slots.builds.get(build_id)
        if build is not None:
            build.cancel(reason or "canceled")

    # What clients ask.

    async def admit(
        self,
        start: Start,
        *,
        member: str,
        make: Callable[..., Job],
        link: ClientLink | None = None,
    ) -> Job:
        """Redeem a ticket and start the build.

        Args:
            start: the ticket and the build.
            member: name in the client's certificate.
            make: makes the build; each kind of client has a kind of build.
            link: to the client; a new one when None.

        Raises:
            AccessDeniedError: the ticket is not valid.
            QueueTimeoutError: the client came too late, its slot was given away.
            NodeLostError: the node is about to stop, or cannot open the project.
            QuotaExceededError: the disk is full.
        """
        ticket = self.tickets.redeem(start.ticket, member=member)
        # From here on the slot is this build's, whatever happens while its project is opened.
        build = self.slots.take(ticket.build_id)
        try:
            job = build.job = await self._open(ticket, start, make, link or ClientLink())
        except BaseException as error:
            self._ends.forget(ticket.build_id)
            self.ended.drop(ticket.build_id)
            state, reason = BuildState.BUILD_STATE_FAILED, str(error)
            if isinstance(error, asyncio.CancelledError):
                state, reason = BuildState.BUILD_STATE_CANCELED, AWAY
            self.link.report(BuildUpdate(build_id=ticket.build_id, state=state, error=reason))
            raise
        self._background.start(self._ends.send_log(job), name=f"log.{job.build_id}")
        log.info(
            "build.started",
            build_id=job.build_id,
            project_id=ticket.project_id,
            member=member,
            trust_domain=ticket.trust_domain,
            network_policy=ticket.network_policy.file,
            # Their names only, for who asks later which build had what.
            given=[*start.spec.secret_ids, *(f"ssh:{name}" for name in start.spec.ssh_ids)],
            entitlements=list(start.spec.entitlements),
        )
        self.link.report_soon(build_update(job, BuildState.BUILD_STATE_RUNNING))
        self._working.start(self._work(job), name=f"build.{job.build_id}")
        return job

    async def _open(
        self, ticket: Ticket, start: Start, make: Callable[..., Job], link: ClientLink
    ) -> Job:
        narrowed = None
        if ticket.HasField("network_policy"):
            policy = ticket.network_policy
            narrowed = await asyncio.to_thread(read_build_policy, policy, admitted=True)
        try:
            runtime = await self._projects.runtime(ticket.project_id, ticket.trust_domain, narrowed)
        except (OSError, sqlite3.Error) as error:
            raise storage_error("open the project", error) from error
        # Refused before anything is opened for it.
        rights = StepRights(start.spec, ticket, runtime.policy)
        job = make(
            ticket,
            start,
            runtime,
            self.registry,
            runtime.registry_address,
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
        build = self.slots.builds.get(build_id)
        if build is None or build.job is None or build.job.member != member:
            raise NotFoundError(f"there is no build {build_id} of yours on this node")
        return build.job

    def find(self, build_id: str, *, member: str | None) -> BuildJob | EndedBuild:
        """Return a build that is here, or is kept after its end.

        Args:
            build_id: the build.
            member: who started it; None for anybody.

        Raises:
            NotFoundError: there is none, or it belongs to somebody else.
        """
        build = self.slots.builds.get(build_id)
        found = build.job if build is not None else self.ended.find(build_id)
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
            result, reason = await self._execute(job)
            try:
                await job.linger()
            finally:
                self._ends.finished(job, result, reason)
        except asyncio.CancelledError:
            self._ends.finished(job, None, STOPPING)
            raise
        except BaseException:
            failure = Failure(kind=Failure.KIND_NODE, message="the node failed; its log says more")
            self._ends.finished(job, Result(failure=failure), "")
            raise
        finally:
            self.visited(job)

    def visited(self, build: BuildJob | EndedBuild) -> None:
        """Hear that a call of a client has ended; after the end of a build the last one counts."""
        present = self.slots.builds.get(build.build_id)
        if present is None:
            # It is kept for clients that come back, or was until now.
            self._ends.sweep()
        elif isinstance(build, BuildJob) and present.over and build.seat.empty:
            self._ends.release(build)

    async def _execute(self, job: BuildJob) -> tuple[Result | None, str]:
        """Run a build; return its result, or None and why it was cancelled."""
        build = self.slots.builds[job.build_id]
        if build.canceled:
            return None, build.canceled
        work = asyncio.ensure_future(job.run())
        build.task = work
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError:
            # The node stops.
            work.cancel()
            await finish(asyncio.wait((work,)), CANCEL_SECONDS)
            raise
        if work.cancelled():
            return None, build.canceled or "the build was interrupted at the node"
        return work.result(), ""

    async def drain(self) -> None:
        """Accept nothing more; wait for running builds and for the cache of finished ones.

        What has not ended after `drain_timeout` is cancelled; its clients and the gateway hear it.
        """
        self.slots.drain()
        self._ends.changed()
        log.info("node.draining", builds=len(self.slots.builds))
        sessions = self._background.start(
            self.sessions.drain(self.config.drain_timeout), name="sessions.drain"
        )
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                await self.slots.empty.wait()
                await self._ends.published()
        except TimeoutError:
            log.warning("node.drain.timed_out", builds=len(self.slots.builds))
        for build_id in list(self.slots.builds):
            self.cancel(build_id, STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self.slots.empty.wait()
        await self._ends.concluded(LEAVE_SECONDS)
        # Bounded by its own time, and what is left then by that of removing engines.
        await asyncio.wait((sessions,), timeout=REMOVE_SECONDS)
        await self.link.flush(LEAVE_SECONDS)
        log.info("node.drained")
