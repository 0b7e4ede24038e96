"""Who calls, and what the token behind the certificate allows now.

A certificate says who it was made for; what that one may do is looked up at every call, so that
revoking a token works at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from offload_core.errors import AccessDeniedError, AuthenticationError
from offload_core.tls import Identity, peer_identity
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from grpc import aio

    from offload_builder.gateway.members import Members
    from offload_builder.gateway.tokens import TokenRecord


@dataclass(frozen=True)
class Caller:
    """A caller whose token is valid now."""

    identity: Identity
    token: TokenRecord

    def check_admin(self, action: str) -> None:
        """Refuse everyone but administrators.

        Args:
            action: continues the sentence "only an administrator may ...".

        Raises:
            AccessDeniedError: the caller is not one.
        """
        if not self.token.is_admin:
            raise AccessDeniedError(f"only an administrator may {action}")

    def check_may_cancel(self, member: str) -> None:
        """Refuse an untrusted member who wants to end somebody else's build.

        Args:
            member: whose build it is.

        Raises:
            AccessDeniedError: it is not the caller's.
        """
        untrusted = self.token.role == identity_pb.ROLE_UNTRUSTED
        if untrusted and member != self.token.name:
            raise AccessDeniedError("an untrusted member may cancel its own builds only")

    def visible_projects(self) -> tuple[str, ...]:
        """Return the projects whose builds may be seen; empty for all."""
        return () if self.token.is_admin else self.token.project_ids


class Access:
    """Finds out who calls."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def member(self, context: aio.ServicerContext[Any, Any]) -> Caller:
        """Return the person or pipeline that calls.

        Raises:
            AuthenticationError: no certificate, or its token is no longer valid.
            AccessDeniedError: it is a node.
        """
        caller = await self._caller(context)
        if caller.identity.kind != "member":
            raise AccessDeniedError("a node's certificate cannot be used for this call")
        return caller

    async def node(self, context: aio.ServicerContext[Any, Any]) -> Caller:
        """Return the node that calls.

        Raises:
            AuthenticationError: no certificate, or its token is no longer valid.
            AccessDeniedError: it is not a node.
        """
        caller = await self._caller(context)
        if caller.identity.kind != "node" or not caller.token.is_node:
            raise AccessDeniedError("only a node may attach; this is a member's certificate")
        return caller

    async def _caller(self, context: aio.ServicerContext[Any, Any]) -> Caller:
        return await self.holder(peer_identity(context))

    async def holder(self, identity: Identity) -> Caller:
        """Return what the token behind an identity, out of a verified certificate, allows now.

        Raises:
            AuthenticationError: the token is no longer valid.
        """
        now = datetime.now(UTC)
        token = await self._members.find_token(identity.token_id)
        if token is None:
            raise AuthenticationError(
                f'the token behind the certificate of "{identity.name}" no longer exists',
                hint="ask an administrator for a new token, then run: offload login",
            )
        token.check_holds(now)
        self._members.note_use(token, now)
        return Caller(identity, token)
