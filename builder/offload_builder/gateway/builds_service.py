"""BuildsService: admission and history for members."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.egress.policy.ofbuild import read_build_policy
from offload_builder.gateway.admission import Placed
from offload_builder.gateway.cachetrust import BranchBound, CacheMember, CacheTrust, proven_branches
from offload_builder.gateway.egresspolicies import POOL
from offload_builder.gateway.history import build_message
from offload_builder.gateway.repeats import lost_build
from offload_builder.gateway.savedimages import (
    image_node,
    image_ticket,
    may_give_image,
    sign_image,
)
from offload_builder.gateway.tickets import CacheWish, cache_scopes, sign
from offload_builder.gateway.tokens import role_name
from offload_core.errors import OffloadError, UsageError
from offload_core.tls import NODE_SUFFIX
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from grpc import aio

    from offload_builder.gateway.access import Access
    from offload_builder.gateway.active_builds import ActiveBuild, ActiveBuilds
    from offload_builder.gateway.admission import Admission
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egresspolicies import EgressPolicies
    from offload_builder.gateway.history import BuildRecord, History
    from offload_builder.gateway.log_book import LogBook
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.tokens import TokenRecord

log = structlog.get_logger(__name__)

TICKET_SKEW = timedelta(seconds=30)
"""How much longer than the slot a ticket is valid, for nodes whose clocks are ahead."""

_RECHECK_SECONDS = 5.0
"""A caller that waited longer is looked up again before it gets a ticket."""


class BuildsService(BuildsServiceServicer):
    """Unpacks, authorises, calls, packs."""

    def __init__(
        self,
        config: GatewayConfig,
        ticket_key: Ed25519PrivateKey,
        access: Access,
        members: Members,
        admission: Admission,
        builds: ActiveBuilds,
        history: History,
        logs: LogBook,
        nodes: NodeRegistry,
        policies: EgressPolicies,
        relay_address: Callable[[], str],
    ) -> None:
        self._config = config
        self._trust = CacheTrust(config.default_branches, config.protected_branches)
        self._ticket_key = ticket_key
        self._access = access
        self._members = members
        self._admission = admission
        self._builds = builds
        self._history = history
        self._logs = logs
        self._nodes = nodes
        self._policies = policies
        self._relay_address = relay_address

    async def Create(  # noqa: N802
        self, request: builds_pb.CreateRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[builds_pb.CreateResponse]:
        """Queue a build and report its place until a node has it."""
        caller = await self._access.member(context)
        if not request.project_id:
            raise UsageError("a build needs a project; set it with --project or in offload.toml")
        caller.token.check_project(request.project_id)
        await self._members.project(request.project_id, visible_to=caller.token)
        proven_branches(request, caller.token.identity)
        # What is not allowed is refused before the build waits for its turn.
        cache_scopes(
            request.project_id,
            CacheMember.behind(caller.token),
            CacheWish(request.vcs_branch, request.vcs_target_branch, request.cache),
            self._trust,
        )
        await self._check_policy(request)
        lost = await lost_build(self._history, request, caller.token)
        build = await self._admission.submit(request, caller.token, lost)
        started = asyncio.get_running_loop().time()
        async with aclosing(self._admission.updates(build)) as updates:
            async for update in updates:
                if isinstance(update, Placed):
                    if asyncio.get_running_loop().time() - started > _RECHECK_SECONDS:
                        await self._still_allowed(build, context)
                    yield builds_pb.CreateResponse(assigned=self.place(build, update))
                else:
                    queued = builds_pb.Queued(
                        build_id=build.build_id, position=update.position, reason=update.reason
                    )
                    yield builds_pb.CreateResponse(queued=queued)

    async def _check_policy(self, request: builds_pb.CreateRequest) -> None:
        """Look at the network policy of a build before anything is sent to a node.

        Raises:
            ConfigError: it has mistakes, told with file and line.
        """
        if request.HasField("network_policy"):
            policy = request.network_policy
            await asyncio.to_thread(read_build_policy, policy)
            versions = await self._policies.versions_now()
            policy.pool_version = versions.get(POOL, 0)
            policy.project_version = versions.get(request.project_id, 0)

    async def _still_allowed(
        self, build: ActiveBuild, context: aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            caller = await self._access.member(context)
            caller.token.check_project(build.record.project_id)
        except OffloadError as error:
            self._admission.give_back(build, why=error.message)
            raise

    def place(self, build: ActiveBuild, placed: Placed) -> builds_pb.Assigned:
        """Return the ticket of a build that a node has accepted.

        Raises:
            OffloadError: its cache scopes are not allowed any more; its slot was given back.
        """
        try:
            return self._assigned(build, placed)
        except OffloadError as error:
            # The gateway came back with other rules while the build waited.
            self._admission.give_back(build, why=error.message)
            raise

    def _assigned(self, build: ActiveBuild, placed: Placed) -> builds_pb.Assigned:
        record, node = build.record, placed.node
        choice = builds_pb.CacheChoice.FromString(record.cache_choice)
        scopes = cache_scopes(
            record.project_id,
            CacheMember(record.member, record.role, BranchBound.of(record.identity)),
            CacheWish(record.vcs_branch, record.vcs_target_branch, choice),
            self._trust,
        )
        log.info(
            "ticket.signed",
            build_id=record.build_id,
            member=record.member,
            read_scopes=scopes.read,
            write_scope=scopes.write,
            trust_domain=scopes.trust_domain,
        )
        ticket = builds_pb.Ticket(
            build_id=record.build_id,
            project_id=record.project_id,
            node_id=node.node_id,
            member=record.member,
            read_scopes=scopes.read,
            write_scope=scopes.write,
            trust_domain=scopes.trust_domain,
            role=role_name(record.role),
            vcs_branch=record.vcs_branch,
            vcs_revision=record.vcs_revision,
        )
        if record.identity:
            ticket.identity.ParseFromString(record.identity)
        if record.network_policy:
            ticket.network_policy.ParseFromString(record.network_policy)
        hold = timedelta(seconds=self._config.slot_hold)
        ticket.expires_at.FromDatetime(datetime.now(UTC) + hold + TICKET_SKEW)
        return builds_pb.Assigned(
            build_id=record.build_id,
            ticket=sign(self._ticket_key, ticket),
            endpoints=self.endpoints(node),
            server_name=node.node_id + NODE_SUFFIX,
            node_id=node.node_id,
        )

    def endpoints(self, node: AttachedNode) -> list[str]:
        """Return where members can dial a node, its own addresses before the relay."""
        endpoints = list(node.hello.endpoints)
        relay = self._relay_address()
        if node.hello.relay_endpoint and relay:
            endpoints.append(relay)
        return endpoints

    async def Locate(  # noqa: N802
        self, request: builds_pb.LocateRequest, context: aio.ServicerContext[Any, Any]
    ) -> builds_pb.LocateResponse:
        """Say where a build is; the node decides who may take it up."""
        caller = await self._access.member(context)
        record = await self._history.resolve(request.build_id, caller.visible_projects())
        response = builds_pb.LocateResponse(build=build_message(record))
        node = self._nodes.find(record.node_id) if record.node_id else None
        if record.node_id:
            response.server_name = record.node_id + NODE_SUFFIX
        if node is not None and node.connection is not None:
            response.endpoints.extend(self.endpoints(node))
        if request.saved_image:
            self._place_image(response, record, caller.token)
        return response

    async def PlanPlatforms(  # noqa: N802
        self, request: builds_pb.PlanPlatformsRequest, context: aio.ServicerContext[Any, Any]
    ) -> builds_pb.PlanPlatformsResponse:
        """Say which platforms of a build one node can build together."""
        caller = await self._access.member(context)
        caller.token.check_project(request.project_id)
        await self._members.project(request.project_id, visible_to=caller.token)
        groups = self._admission.plan_platforms(request.project_id, request.platforms)
        return builds_pb.PlanPlatformsResponse(
            groups=[builds_pb.PlatformGroup(platforms=group) for group in groups]
        )

    def _place_image(
        self, response: builds_pb.LocateResponse, record: BuildRecord, token: TokenRecord
    ) -> None:
        """Say which node can give a saved image, when its own cannot."""
        now = datetime.now(UTC)
        if not may_give_image(record, token, now):
            return
        node = image_node(record, self._nodes.connected())
        if node is None:
            return
        ticket = image_ticket(record, node.node_id, now)
        response.saved_image.node_id = node.node_id
        response.saved_image.endpoints.extend(self.endpoints(node))
        response.saved_image.server_name = node.node_id + NODE_SUFFIX
        response.saved_image.ticket.CopyFrom(sign_image(self._ticket_key, ticket))

    async def List(  # noqa: N802
        self, request: builds_pb.ListRequest, context: aio.ServicerContext[Any, Any]
    ) -> builds_pb.ListResponse:
        """Return builds, newest first."""
        caller = await self._access.member(context)
        projects = caller.visible_projects()
        if request.project_id:
            caller.token.check_project(request.project_id)
            await self._members.project(request.project_id, visible_to=caller.token)
            projects = (request.project_id,)
        records, next_token = await self._history.page(
            projects, size=request.page_size, token=request.page_token
        )
        return builds_pb.ListResponse(
            builds=[build_message(record) for record in records], next_page_token=next_token
        )

    async def Get(  # noqa: N802
        self, request: builds_pb.GetRequest, context: aio.ServicerContext[Any, Any]
    ) -> builds_pb.GetResponse:
        """Return one build."""
        caller = await self._access.member(context)
        record = await self._history.resolve(request.build_id, caller.visible_projects())
        return builds_pb.GetResponse(build=build_message(record))

    async def Logs(  # noqa: N802
        self, request: builds_pb.LogsRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[builds_pb.LogsResponse]:
        """Replay a log, and follow it."""
        caller = await self._access.member(context)
        record = await self._history.resolve(request.build_id, caller.visible_projects())
        build_id = record.build_id
        batches = self._logs.read(
            build_id,
            after=max(0, request.resume_after),
            follow=request.follow,
            ended=lambda: self._builds.find(build_id) is None,
        )
        async with aclosing(batches) as runs:
            async for run in runs:
                yield builds_pb.LogsResponse(batches=run)

    async def Cancel(  # noqa: N802
        self, request: builds_pb.CancelRequest, context: aio.ServicerContext[Any, Any]
    ) -> builds_pb.CancelResponse:
        """End a build; one that has ended already stays as it is."""
        caller = await self._access.member(context)
        record = await self._history.resolve(request.build_id, caller.visible_projects())
        caller.check_may_cancel(record.member)
        response = builds_pb.CancelResponse()
        build = self._builds.find(record.build_id)
        if build is not None:
            grace = self._admission.cancel(build, by=caller.token.name)
            response.grace_period.FromTimedelta(timedelta(seconds=grace))
        return response
