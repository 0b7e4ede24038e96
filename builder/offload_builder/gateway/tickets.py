"""Build tickets: what the gateway promises a node about one build, and the cache scopes in it.

A node verifies a ticket with the public key of its Welcome over `SIGNED_PREFIX` + payload and
needs no call to the gateway for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import quote

from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNED_PREFIX = b"offload.v1.Ticket\n"
"""Keeps a ticket's signature from being valid for any other kind of message."""


def sign(key: Ed25519PrivateKey, ticket: builds_pb.Ticket) -> builds_pb.SignedTicket:
    """Return a ticket with the signature over exactly the bytes that are sent."""
    payload = ticket.SerializeToString()
    return builds_pb.SignedTicket(payload=payload, signature=key.sign(SIGNED_PREFIX + payload))


@dataclass(frozen=True)
class CacheScopes:
    """What a build may read, in order, and write; `write` is empty for nothing."""

    read: tuple[str, ...]
    write: str


def cache_scopes(
    project_id: str,
    *,
    branch: str,
    member: str,
    role: int,
    default_branches: Sequence[str],
    protected_branches: Sequence[str],
) -> CacheScopes:
    """Return the cache scopes of a build.

    Scopes are `PROJECT/BRANCH` with the branch percent-encoded. Names that begin with "~" are
    ours and cannot be branches: git-check-ref-format(1) forbids that character. `~team` is the
    scope of builds without a known branch, `~untrusted-MEMBER` belongs to one untrusted member.

    Args:
        project_id: the project.
        branch: as the client says; empty when unknown.
        member: name of the caller.
        role: of the caller's token.
        default_branches: read after the own branch.
        protected_branches: patterns; only administrators and pipelines write these.
    """
    team = f"{project_id}/~team"
    own = f"{project_id}/{quote(branch, safe='')}" if branch else team
    if role == identity_pb.ROLE_UNTRUSTED:
        own = f"{project_id}/~untrusted-{quote(member, safe='')}"
    trusted = role in (identity_pb.ROLE_ADMIN, identity_pb.ROLE_CI)
    protected = any(fnmatchcase(branch, pattern) for pattern in protected_branches)
    defaults = [f"{project_id}/{quote(name, safe='')}" for name in default_branches]
    may_write = role == identity_pb.ROLE_UNTRUSTED or trusted or not protected
    return CacheScopes(
        read=tuple(dict.fromkeys([own, *defaults, team])),
        write=own if may_write else "",
    )
