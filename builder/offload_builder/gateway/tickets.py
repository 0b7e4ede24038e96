"""Build tickets: what the gateway promises a node about one build, and the cache scopes in it.

A node verifies a ticket with the public key of its Welcome over `SIGNED_PREFIX` + payload and
needs no call to the gateway for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.gateway.cachetrust import (
    TEAM,
    UNTRUSTED,
    check_branch,
    check_scope_name,
    scope_id,
)
from offload_core.errors import AccessDeniedError, UsageError
from offload_proto.v1 import builds_service_pb2 as builds_pb

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from offload_builder.gateway.cachetrust import CacheMember, CacheTrust

SIGNED_PREFIX = b"offload.v1.Ticket\n"
"""Keeps a ticket's signature from being valid for any other kind of message."""

PROTECTED = "protected"
"""Trust domain of builds that may write a protected scope."""

MAX_READ_SCOPES = 16
"""Scopes that a user may name for one build."""


def sign(key: Ed25519PrivateKey, ticket: builds_pb.Ticket) -> builds_pb.SignedTicket:
    """Return a ticket with the signature over exactly the bytes that are sent."""
    payload = ticket.SerializeToString()
    return builds_pb.SignedTicket(payload=payload, signature=key.sign(SIGNED_PREFIX + payload))


@dataclass(frozen=True)
class CacheScopes:
    """What a build may read, in order, and write.

    Attributes:
        read: scopes; none when nothing is to be read.
        write: a scope; empty for nothing.
        trust_domain: builds of different domains never share a BuildKit: empty for ordinary
            members, "protected" for builds that may write a protected scope, "untrusted-NAME".
    """

    read: tuple[str, ...]
    write: str
    trust_domain: str = ""


@dataclass(frozen=True)
class CacheWish:
    """What a build says of itself and asks of the cache.

    Attributes:
        branch: of the context; empty when unknown.
        target_branch: that a pull request is to be merged into; empty when it is none.
        choice: what the user asks.
    """

    branch: str = ""
    target_branch: str = ""
    choice: builds_pb.CacheChoice = field(default_factory=builds_pb.CacheChoice)


def cache_scopes(
    project_id: str, member: CacheMember, wish: CacheWish, trust: CacheTrust
) -> CacheScopes:
    """Return the cache scopes of a build.

    Read are: the scopes that the user names, the own one, the target of a pull request, the
    default branches, `~team`. A build that may write a protected scope reads protected ones only.
    Whoever asks, a pull request writes no protected scope, no default branch and not its target:
    its code is not accepted there yet, and in a fork its branch may have any name.

    Args:
        project_id: the project.
        member: the caller.
        wish: what is asked for.
        trust: the gateway's rules.

    Raises:
        UsageError: a name cannot be used, or wishes contradict each other.
        AccessDeniedError: the user asks for what identity does not allow.
    """
    choice = wish.choice
    _check_names(wish)
    if member.is_untrusted:
        below = f"/{choice.scope}" if choice.scope else ""
        own = f"{member.own_scope}{below}"
        domain = f"{UNTRUSTED}{member.name}"
        reason = ""
    else:
        own, domain = choice.scope or wish.branch or TEAM, ""
        reason = trust.why_not_write(member, own) or _pull_request_reason(
            own, wish, trust, proven=member.bound is not None and member.bound.pull_request
        )
        if reason and choice.scope and not choice.write_off:
            raise AccessDeniedError(
                reason, hint="choose another cache scope, or ask for it to be read only"
            )
        if not reason and trust.is_protected(own):
            domain = PROTECTED
    names = [*choice.read_scopes, own, wish.target_branch, *trust.default_branches, TEAM]
    if domain == PROTECTED:
        low = next((name for name in choice.read_scopes if not trust.is_protected(name)), None)
        if low is not None:
            raise AccessDeniedError(
                f'a build for the protected cache scope "{own}" reads protected scopes only, '
                f'and "{low}" is not protected',
                hint="promote its entries, or build for another cache scope",
            )
        names = [name for name in names if trust.is_protected(name)]
    read = dict.fromkeys(scope_id(project_id, name) for name in names if name)
    return CacheScopes(
        read=() if choice.read_off else tuple(read),
        write="" if reason or choice.write_off else scope_id(project_id, own),
        trust_domain=domain,
    )


def _check_names(wish: CacheWish) -> None:
    choice = wish.choice
    check_branch(wish.branch)
    check_branch(wish.target_branch, "target branch")
    for name in (*choice.read_scopes, *([choice.scope] if choice.scope else [])):
        check_scope_name(name)
    if len(choice.read_scopes) > MAX_READ_SCOPES:
        raise UsageError(f"a build reads at most {MAX_READ_SCOPES} cache scopes that are named")
    if choice.read_off and choice.read_scopes:
        raise UsageError("a build that reads no cache cannot read named cache scopes; choose one")


def _pull_request_reason(name: str, wish: CacheWish, trust: CacheTrust, *, proven: bool) -> str:
    if not wish.target_branch and not proven:
        return ""
    kept = name == wish.target_branch or name in trust.default_branches
    if not kept and not trust.is_protected(name):
        return ""
    return f'the build of a pull request does not write the cache scope "{name}"'
