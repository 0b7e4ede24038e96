"""EnrollmentService and IdentityService: from a token to a certificate, and on to fresh ones."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.enrolments import Enrolment, new_enrolment_id
from offload_builder.gateway.peers import peer_host
from offload_builder.gateway.tokens import TokenText, role_name, verify
from offload_core import VERSION
from offload_core.errors import AccessDeniedError, AuthenticationError
from offload_core.tls import Identity
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.identity_service_pb2_grpc import (
    EnrollmentServiceServicer,
    IdentityServiceServicer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpc import aio

    from offload_builder.gateway.access import Access
    from offload_builder.gateway.ca import CertificateAuthority, Issued
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.oidc.exchange import Exchange
    from offload_builder.gateway.ratelimits import LoginLimits
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

    def node(self, node_id: str, token_id: str, csr_pem: bytes) -> Issued:
        """Return a node's certificate.

        Raises:
            UsageError: the name or the certificate request cannot be used.
        """
        issued = self._authority.issue_node(
            csr_pem, node_id=node_id, token_id=token_id, expires_at=self.node_end()
        )
        log.info("certificate.issued", node_id=node_id, token_id=token_id)
        return issued

    def node_end(self) -> datetime:
        """Return when a node's certificate ends that begins now."""
        return datetime.now(UTC) + timedelta(seconds=self._config.node_certificate_lifetime)


class EnrollmentService(EnrollmentServiceServicer):
    """The only service without a client certificate."""

    def __init__(
        self,
        authority: CertificateAuthority,
        issuer: CertificateIssuer,
        members: Members,
        nodes: NodeRegistry,
        exchange: Exchange,
        limits: LoginLimits,
    ) -> None:
        self._limits = limits
        self._authority = authority
        self._issuer = issuer
        self._exchange = exchange
        self._members = members
        self._nodes = nodes

    async def Login(  # noqa: N802
        self,
        request: identity_pb.LoginRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.LoginResponse:
        """Turn a member's token into a certificate."""
        with self._attempt(context):
            token = await self._prove(request.token)
        if token.is_node:
            raise AccessDeniedError(
                "this token is for nodes; people and pipelines need a token of another role",
                hint="make one with: offload-builder token create --role member NAME",
            )
        self._limits.certificate(token.token_id)
        return identity_pb.LoginResponse(
            certificate=self._issuer.member(token),
            member=token.name,
            role=token.role,
            project_ids=() if token.is_admin else token.project_ids,
        )

    async def DescribeLogin(  # noqa: N802
        self,
        request: identity_pb.DescribeLoginRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.DescribeLoginResponse:
        """Say where people and pipelines prove who they are."""
        self._limits.attempt(peer_host(context))
        policy = self._exchange.policy
        response = identity_pb.DescribeLoginResponse(
            audience=policy.audience, issuers=[issuer.url for issuer in policy.issuers.values()]
        )
        if policy.person is not None:
            response.person.issuer = policy.person.url
            response.person.client_id = policy.person.client_id
            response.person.scopes.extend(policy.person.scopes)
        return response

    async def Exchange(  # noqa: N802
        self,
        request: identity_pb.ExchangeRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.ExchangeResponse:
        """Turn an identity provider's token into a short certificate."""
        with self._attempt(context):
            login = await self._exchange.login(request.token)
        self._limits.certificate(login.token_id)
        response = identity_pb.ExchangeResponse(
            certificate=self._issuer.member(login),
            member=login.name,
            role=login.role,
            project_ids=() if login.is_admin else login.project_ids,
        )
        response.identity.ParseFromString(login.identity)
        return response

    async def EnrollNode(  # noqa: N802
        self,
        request: identity_pb.EnrollNodeRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.EnrollNodeResponse:
        """Turn a node's token into a certificate for its own key."""
        with self._attempt(context):
            token = await self._prove(request.token)
        if not token.is_node:
            raise AccessDeniedError(
                f"this token has the role {role_name(token.role)}; a node needs one of its own",
                hint="make one with: offload-builder token create --role node NAME",
            )
        self._limits.certificate(token.token_id)
        self._nodes.check_name(request.node_id, token)
        key_hash = self._authority.key_hash(request.csr_pem)
        known = await self._members.enrolments.known(token.token_id, request.node_id, key_hash)
        enrolment_id = known.enrolment_id if known is not None else new_enrolment_id()
        # The request is checked before it counts as a use of the token.
        issued = self._issuer.node(request.node_id, enrolment_id, request.csr_pem)
        wanted = Enrolment(
            enrolment_id=enrolment_id,
            token_id=token.token_id,
            node_id=request.node_id,
            key_hash=key_hash,
            created_at=datetime.now(UTC),
            expires_at=issued.expires_at,
        )
        entered = await self._members.enrolments.enter(token, wanted)
        if entered.enrolment_id != enrolment_id:
            raise AuthenticationError("this node is being enrolled by another call; try again")
        message = identity_pb.EnrollNodeResponse(
            certificate_pem=issued.certificate_pem,
            ca_pem=self._authority.ca_pem,
            node_id=request.node_id,
        )
        message.expires_at.FromDatetime(issued.expires_at)
        return message

    @contextmanager
    def _attempt(self, context: aio.ServicerContext[Any, Any]) -> Iterator[None]:
        """Count what proves, or does not prove, who somebody is."""
        host = peer_host(context)
        self._limits.attempt(host)
        try:
            yield
        except (AuthenticationError, AccessDeniedError):
            self._limits.failed(host)
            raise

    async def _prove(self, text: str) -> TokenRecord:
        parsed = TokenText.parse(text)
        now = datetime.now(UTC)
        token = verify(
            parsed,
            await self._members.find_token(parsed.token_id),
            ca_fingerprints=self._authority.pinned_fingerprints(),
            now=now,
        )
        self._members.note_use(token, now)
        return token


class IdentityService(IdentityServiceServicer):
    """What a certificate stands for."""

    def __init__(
        self,
        access: Access,
        issuer: CertificateIssuer,
        authority: CertificateAuthority,
        members: Members,
        limits: LoginLimits,
    ) -> None:
        self._access = access
        self._issuer = issuer
        self._authority = authority
        self._members = members
        self._limits = limits

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
        if caller.token.identity:
            response.identity.ParseFromString(caller.token.identity)
        return response

    async def Renew(  # noqa: N802
        self,
        request: identity_pb.RenewRequest,  # noqa: ARG002
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb.RenewResponse:
        """Give a fresh certificate."""
        caller = await self._access.member(context)
        if caller.token.identity:
            raise AuthenticationError(
                "a login by an identity provider is renewed with a fresh token of that provider",
                hint="run: offload login --oidc",
            )
        self._limits.certificate(caller.token.token_id)
        return identity_pb.RenewResponse(certificate=self._issuer.member(caller.token))

    async def RenewNode(  # noqa: N802
        self, request: identity_pb.RenewNodeRequest, context: aio.ServicerContext[Any, Any]
    ) -> identity_pb.RenewNodeResponse:
        """Give a node a fresh certificate."""
        caller = await self._access.node(context)
        token_id = caller.token.token_id
        self._limits.certificate(token_id)
        issued = self._issuer.node(caller.identity.name, token_id, request.csr_pem)
        await self._members.enrolments.renewed(token_id, issued.expires_at)
        message = identity_pb.RenewNodeResponse(
            certificate_pem=issued.certificate_pem, ca_pem=self._authority.ca_pem
        )
        message.expires_at.FromDatetime(issued.expires_at)
        return message


def _end(token: TokenRecord, lifetime_seconds: float) -> datetime:
    end = datetime.now(UTC) + timedelta(seconds=lifetime_seconds)
    return end if token.expires_at is None else min(end, token.expires_at)
