"""Builds that nodes bring: their clients speak BuildKit's API and know nothing of ours.

A node has verified the client's certificate in TLS and shows it here. The gateway looks at it
again, finds out what its token allows now, and queues the build for a slot of that node.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.admission import Placed
from offload_builder.gateway.cachetrust import CacheMember, CacheTrust, proven_branches
from offload_builder.gateway.tickets import CacheWish, cache_scopes
from offload_builder.gateway.tokens import role_name
from offload_core.errors import AccessDeniedError, OffloadError, UsageError
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from offload_builder.gateway.access import Access, Caller
    from offload_builder.gateway.active_builds import ActiveBuild
    from offload_builder.gateway.admission import Admission
    from offload_builder.gateway.ca import CertificateAuthority
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members

log = structlog.get_logger(__name__)

_RECHECK_SECONDS = 5.0
"""A client whose build waited longer is looked up again before it gets a ticket."""


class NodeAdmission:
    """What `NodesService` answers about members.

    Args:
        config: of the gateway.
        authority: has signed the certificates.
        access: knows what tokens allow.
        members: the projects.
        admission: the queue.
        place: makes the ticket of a build that a node has accepted.
    """

    def __init__(
        self,
        config: GatewayConfig,
        authority: CertificateAuthority,
        access: Access,
        members: Members,
        admission: Admission,
        place: Callable[[ActiveBuild, Placed], builds_pb.Assigned],
    ) -> None:
        self._trust = CacheTrust(config.default_branches, config.protected_branches)
        self._authority = authority
        self._access = access
        self._members = members
        self._admission = admission
        self._place = place

    async def authorize(
        self, request: nodes_pb.AuthorizeRequest, node: Caller
    ) -> nodes_pb.AuthorizeResponse:
        """Say what a member is in a project.

        Raises:
            AuthenticationError: the certificate or its token is not valid any more.
            AccessDeniedError: the project is not the member's, or not the node's.
            NotFoundError: there is no such project.
        """
        member = await self._member(request.certificate_der, request.project_id, node)
        scopes = cache_scopes(
            request.project_id,
            CacheMember.behind(member.token),
            CacheWish(),
            self._trust,
        )
        return nodes_pb.AuthorizeResponse(
            member=member.token.name,
            role=role_name(member.token.role),
            trust_domain=scopes.trust_domain,
        )

    async def _member(self, certificate_der: bytes, project_id: str, node: Caller) -> Caller:
        node.token.check_project(project_id)
        try:
            member = await self._access.holder(self._authority.identity_of(certificate_der))
            if member.identity.kind != "member":
                raise AccessDeniedError("only members of the pool build; this is a node")
            member.token.check_project(project_id)
            await self._members.project(project_id, visible_to=member.token)
        except OffloadError as error:
            log.warning(
                "buildkit.access.refused",
                project_id=project_id,
                node_id=node.identity.name,
                reason=error.message,
            )
            raise
        return member

    async def admit(
        self, request: nodes_pb.AdmitRequest, node: Caller
    ) -> AsyncGenerator[nodes_pb.AdmitResponse]:
        """Queue a build for a slot of the node and report its place until it has one.

        Raises:
            OffloadError: the member may not build, or the build left the queue.
        """
        wish, node_id = request.build, node.identity.name
        if not wish.client:
            raise UsageError("a node names the program whose build it brings")
        if wish.HasField("network_policy"):
            # Its client is connected already, to a BuildKit without that policy.
            raise UsageError("only builds of offload-build can bring a network policy")
        member = await self._member(request.certificate_der, wish.project_id, node)
        proven_branches(wish, member.token.identity)
        cache_scopes(
            wish.project_id,
            CacheMember.behind(member.token),
            CacheWish(wish.vcs_branch, wish.vcs_target_branch, wish.cache),
            self._trust,
        )
        build = await self._admission.submit(wish, member.token, node_id=node_id)
        log.info(
            "buildkit.build.brought",
            build_id=build.build_id,
            project_id=wish.project_id,
            member=member.token.name,
            node_id=node_id,
            client=wish.client,
        )
        if request.beside_build_id:
            self._admission.place_beside(build, request.beside_build_id)
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with aclosing(self._admission.updates(build)) as updates:
            async for update in updates:
                if not isinstance(update, Placed):
                    queued = builds_pb.Queued(
                        build_id=build.build_id, position=update.position, reason=update.reason
                    )
                    yield nodes_pb.AdmitResponse(queued=queued)
                    continue
                if loop.time() - started > _RECHECK_SECONDS:
                    await self._still_allowed(build, request, node)
                yield nodes_pb.AdmitResponse(assigned=self._place(build, update))

    async def _still_allowed(
        self, build: ActiveBuild, request: nodes_pb.AdmitRequest, node: Caller
    ) -> None:
        try:
            await self._member(request.certificate_der, request.build.project_id, node)
        except OffloadError as error:
            self._admission.give_back(build, why=error.message)
            raise
