"""Who may use a session beside its owner."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.gateway.sessions.requests import MAX_SHARED
from offload_core.errors import AccessDeniedError, AuthenticationError, NotFoundError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.sessions.table import SessionRecord
    from offload_builder.gateway.tokens import TokenRecord
    from offload_proto.v1 import sessions_service_pb2 as sessions_pb


async def shared_with(
    members: Members, record: SessionRecord, request: sessions_pb.ShareSessionRequest
) -> tuple[str, ...]:
    """Return who may use a session after a request.

    Raises:
        UsageError: they are too many, or the owner is among them.
        NotFoundError: one is no member of the project.
        AccessDeniedError: an untrusted member would get into somebody else's session.
    """
    if len(request.add) > MAX_SHARED or len(request.remove) > MAX_SHARED:
        raise UsageError(f"a session is shared with at most {MAX_SHARED} members")
    for name in dict.fromkeys(request.add):
        if name == record.owner:
            raise UsageError(f'the session is that of "{name}", who may use it anyway')
        await _check_member(members, record, name)
    # Nothing is awaited from here on: another request may have changed the list meanwhile, and whom
    # that has removed must not come back by this one.
    kept = [name for name in record.shared_with if name not in request.remove]
    kept += [name for name in dict.fromkeys(request.add) if name not in kept]
    if len(kept) > MAX_SHARED:
        raise UsageError(f"a session is shared with at most {MAX_SHARED} members")
    return tuple(kept)


async def _check_member(members: Members, record: SessionRecord, name: str) -> None:
    tokens = [
        token
        for token in await members.tokens_of(name)
        if token.may_use(record.project_id) and _holds(token)
    ]
    if not tokens:
        raise NotFoundError(
            f'"{name[:64]}" is no member of the project "{record.project_id}"',
            hint="name members as `offload whoami` shows them",
        )
    if any(token.role == identity_pb.ROLE_UNTRUSTED for token in tokens):
        raise AccessDeniedError(
            f'"{name[:64]}" is an untrusted member, who may use no session of others'
        )


def _holds(token: TokenRecord) -> bool:
    try:
        token.check_usable(datetime.now(UTC))
    except AuthenticationError:
        return False
    return True
