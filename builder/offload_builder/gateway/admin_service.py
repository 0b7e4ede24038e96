"""AdminService: tokens, projects and the pool."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from offload_core.errors import AuthenticationError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.identity_service_pb2_grpc import AdminServiceServicer

if TYPE_CHECKING:
    from grpc import aio

    from offload_builder.gateway.access import Access
    from offload_builder.gateway.admission import Admission
    from offload_builder.gateway.members import Members, ProjectRecord
    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.revocationfeed import RevocationFeed
    from offload_builder.gateway.tokens import TokenRecord

log = structlog.get_logger(__name__)


class AdminService(AdminServiceServicer):
    """Unpacks, authorises, calls, packs."""

    def __init__(
        self,
        access: Access,
        members: Members,
        nodes: NodeRegistry,
        admission: Admission,
        revocations: RevocationFeed,
    ) -> None:
        self._revocations = revocations
        self._access = access
        self._members = members
        self._nodes = nodes
        self._admission = admission

    async def CreateToken(  # noqa: N802
        self, request: identity_pb.CreateTokenRequest, context: aio.ServicerContext[Any, Any]
    ) -> identity_pb.CreateTokenResponse:
        """Make a token and show it once."""
        caller = await self._access.member(context)
        caller.check_admin("make tokens")
        record, text = await self._members.create_token(
            name=request.name,
            role=request.role,
            project_ids=request.project_ids,
            expires_at=_expiry(request),
            max_uses=request.max_uses if request.HasField("max_uses") else None,
        )
        log.info("token.created", token_id=record.token_id, name=record.name, by=caller.token.name)
        return identity_pb.CreateTokenResponse(token=token_message(record), secret=text.reveal())

    async def ListTokens(  # noqa: N802
        self,
        request: identity_pb.ListTokensRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.ListTokensResponse:
        """Return all tokens without their secrets."""
        caller = await self._access.member(context)
        caller.check_admin("list tokens")
        records = await self._members.list_tokens()
        uses = await self._members.enrolments.uses()
        return identity_pb.ListTokensResponse(
            tokens=[token_message(item, uses.get(item.token_id, 0)) for item in records]
        )

    async def RevokeToken(  # noqa: N802
        self, request: identity_pb.RevokeTokenRequest, context: aio.ServicerContext[Any, Any]
    ) -> identity_pb.RevokeTokenResponse:
        """End a token: the streams of its nodes, its builds and its open calls everywhere."""
        caller = await self._access.member(context)
        caller.check_admin("revoke tokens")
        record = await self._members.revoke_token(request.token_id)
        log.info("token.revoked", token_id=record.token_id, name=record.name, by=caller.token.name)
        why = f'the token {record.token_id} of "{record.name}" was revoked'
        self._nodes.disconnect_token(record.token_id, AuthenticationError(why))
        self._admission.cancel_token(record.token_id, why=why)
        await self._revocations.refresh()
        return identity_pb.RevokeTokenResponse()

    async def CreateProject(  # noqa: N802
        self, request: identity_pb.CreateProjectRequest, context: aio.ServicerContext[Any, Any]
    ) -> identity_pb.CreateProjectResponse:
        """Make a project."""
        caller = await self._access.member(context)
        caller.check_admin("make projects")
        record = await self._members.create_project(request.project_id)
        log.info("project.created", project_id=record.project_id, by=caller.token.name)
        return identity_pb.CreateProjectResponse(project=project_message(record))

    async def ListProjects(  # noqa: N802
        self,
        request: identity_pb.ListProjectsRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.ListProjectsResponse:
        """Return the projects that the caller may use."""
        caller = await self._access.member(context)
        records = await self._members.list_projects()
        return identity_pb.ListProjectsResponse(
            projects=[
                project_message(record)
                for record in records
                if caller.token.may_use(record.project_id)
            ]
        )

    async def ListNodes(  # noqa: N802
        self,
        request: identity_pb.ListNodesRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.ListNodesResponse:
        """Return the pool."""
        await self._access.member(context)
        return identity_pb.ListNodesResponse(nodes=self._nodes.infos())


def token_message(record: TokenRecord, uses: int = 0) -> identity_pb.Token:
    """Return a token as the API shows it."""
    message = identity_pb.Token(
        token_id=record.token_id,
        name=record.name,
        role=record.role,
        project_ids=record.project_ids,
        max_uses=record.max_uses or 0,
        uses=uses,
    )
    message.created_at.FromDatetime(record.created_at)
    if record.expires_at is not None:
        message.expires_at.FromDatetime(record.expires_at)
    if record.last_used_at is not None:
        message.last_used_at.FromDatetime(record.last_used_at)
    if record.revoked_at is not None:
        message.revoked_at.FromDatetime(record.revoked_at)
    return message


def project_message(record: ProjectRecord) -> identity_pb.Project:
    """Return a project as the API shows it."""
    message = identity_pb.Project(project_id=record.project_id)
    message.created_at.FromDatetime(record.created_at)
    return message


def _expiry(request: identity_pb.CreateTokenRequest) -> datetime | None:
    if not request.HasField("expires_at"):
        return None
    try:
        return request.expires_at.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError("the end of the token is not a valid time") from error
