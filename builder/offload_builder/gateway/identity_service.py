"""EnrollmentService and IdentityService: from a token to a certificate, and on to fresh ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.tokens import TokenText, role_name, verify
from offload_core import VERSION
from offload_core.errors import AccessDeniedError
from offload_core.tls import Identity
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.identity_service_pb2_grpc import (
    EnrollmentServiceServicer,
    IdentityServiceServicer,
)

if TYPE_CHECKING:
    from grpc import aio

    from offload_builder.gateway.access import Access
    from offload_builder.gateway.ca import CertificateAuthority
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.tokens import TokenRecord

log = structlog.get_logger(__name__)


class CertificateIssuer:
    """Issues what a token is good for."""

    def __init__(self, config: GatewayConfig, authority: CertificateAuthority) -> None:
        self._config = config
        self._authority = authority

    def member(self, token: TokenRecord) -> identity_pb.ClientCertificate:
        """Return a client certificate that ends no later than the token."""
        identity = Identity("member", token.name, token.token_id, role_name(token.role))
        keys, expires_at = self._authority.issue_member(
            identity, _end(token, self._config.member_certificate_lifetime)
        )
        message = identity_pb.ClientCertificate(
            certificate_pem=keys.certificate_pem,
            private_key_pem=keys.private_key_pem,
            ca_pem=keys.ca_pem,
        )
        message.expires_at.FromDatetime(expires_at)
        log.info("certificate.issued", member=token.name, token_id=token.token_id)
        return message

    def node(
        self, token: TokenRecord, request: identity_pb.EnrollNodeRequest
    ) -> identity_pb.EnrollNodeResponse:
        """Return a node's certificate.

        Raises:
            UsageError: the name or the certificate request cannot be used.
        """
        issued = self._authority.issue_node(
            request.csr_pem,
            node_id=request.node_id,
            token_id=token.token_id,
            expires_at=_end(token, self._config.node_certificate_lifetime),
        )
        message = identity_pb.EnrollNodeResponse(
            certificate_pem=issued.certificate_pem,
            ca_pem=self._authority.ca_pem,
            node_id=request.node_id,
        )
        message.expires_at.FromDatetime(issued.expires_at)
        log.info("certificate.issued", node_id=request.node_id, token_id=token.token_id)
        return message


class EnrollmentService(EnrollmentServiceServicer):
    """The only service without a client certificate."""

    def __init__(
        self,
        authority: CertificateAuthority,
        issuer: CertificateIssuer,
        members: Members,
        nodes: NodeRegistry,
    ) -> None:
        self._authority = authority
        self._issuer = issuer
        self._members = members
        self._nodes = nodes

    async def Login(  # noqa: N802
        self,
        request: identity_pb.LoginRequest,
        context: aio.ServicerContext[Any, Any],  # noqa: ARG002
    ) -> identity_pb.LoginResponse:
        """Turn a member's token into a certificate."""
        token = await self._prove(request.token)
        if token.is_node:
            raise AccessDeniedError(
                "this token is for nodes; people and pipelines need a token of another role",
                hint="make one with: offload-builder token create --role member NAME",
            )
        return identity_pb.LoginResponse(
            certificate=self._issuer.member(token),
            member=token.name,
            role=token.role,
            project_ids=() if token.is_admin else token.project_ids,
        )

    async def EnrollNode(  # noqa: N802
        self,
        request: identity_pb.EnrollNodeRequest,
        context: aio.ServicerContext[Any, Any],  # noqa: ARG002
    ) -> identity_pb.EnrollNodeResponse:
        """Turn a node's token into a certificate for its own key."""
        token = await self._prove(request.token)
        if not token.is_node:
            raise AccessDeniedError(
                f"this token has the role {role_name(token.role)}; a node needs one of its own",
                hint="make one with: offload-builder token create --role node NAME",
            )
        self._nodes.check_name(request.node_id, token)
        return self._issuer.node(token, request)

    async def _prove(self, text: str) -> TokenRecord:
        parsed = TokenText.parse(text)
        now = datetime.now(UTC)
        token = verify(
            parsed,
            await self._members.find_token(parsed.token_id),
            ca_fingerprint=self._authority.fingerprint(),
            now=now,
        )
        self._members.note_use(token, now)
        return token


class IdentityService(IdentityServiceServicer):
    """What a certificate stands for."""

    def __init__(self, access: Access, issuer: CertificateIssuer) -> None:
        self._access = access
        self._issuer = issuer

    async def WhoAmI(  # noqa: N802
        self,
        request: identity_pb.WhoAmIRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.WhoAmIResponse:
        """Describe the caller."""
        caller = await self._access.member(context)
        response = identity_pb.WhoAmIResponse(
            member=caller.token.name,
            role=caller.token.role,
            project_ids=caller.visible_projects(),
            gateway_version=VERSION,
        )
        if caller.token.expires_at is not None:
            response.token_expires_at.FromDatetime(caller.token.expires_at)
        return response

    async def Renew(  # noqa: N802
        self,
        request: identity_pb.RenewRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.RenewResponse:
        """Give a fresh certificate."""
        caller = await self._access.member(context)
        return identity_pb.RenewResponse(certificate=self._issuer.member(caller.token))


def _end(token: TokenRecord, lifetime_seconds: float) -> datetime:
    end = datetime.now(UTC) + timedelta(seconds=lifetime_seconds)
    return end if token.expires_at is None else min(end, token.expires_at)
