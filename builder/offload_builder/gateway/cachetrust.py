"""Who may read, write, remove and promote which cache scopes. Rules only: pure functions.

A cache scope has one of three levels, and content never moves up by itself:

    untrusted    scopes of one untrusted member, "~untrusted-NAME" and "~untrusted-NAME/..."
    member       branches that are not protected, and "~team" for builds without a known branch
    protected    branches that match `protected_branches`

A build reads its own level and those above, and writes one scope of its own level. The level of a
build follows from who asks and from what it may write (`offload_builder.gateway.tickets`).

Names that begin with "~" are ours and cannot be branches: git-check-ref-format(1) forbids it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from offload_cache.keys import packed_key
from offload_core.errors import AccessDeniedError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.gateway.tokens import TokenRecord
    from offload_proto.v1.builds_service_pb2 import CreateRequest

TEAM = "~team"
"""Scope of builds without a known branch."""

UNTRUSTED = "untrusted-"
"""Begins the names of an untrusted member's scopes, after a "~", and of its trust domain."""

MAX_NAME = 500
"""Characters of a branch or scope."""

_REFUSED = re.compile(r"[\x00-\x1f\x7f~^:?*\[\\\s]|\.\.|//|^/|/$|@\{")
_BRANCH_REFUSED = re.compile(r"[\x00-\x1f\x7f~]")
_KEPT = 60
_TRUSTED = (identity_pb.ROLE_ADMIN, identity_pb.ROLE_CI)


class Level(IntEnum):
    """How far content of a scope is trusted; higher ones are never built from lower ones."""

    UNTRUSTED = 0
    MEMBER = 1
    PROTECTED = 2


@dataclass(frozen=True)
class BranchBound:
    """What an identity provider proves of the branch that is built.

    Attributes:
        branch: empty for none, for example a tag.
        protected: its protected scope may be written.
        pull_request: what is built is not accepted yet.
    """

    branch: str
    protected: bool
    pull_request: bool

    @classmethod
    def of(cls, identity: bytes) -> BranchBound | None:
        """Return the bound of a serialised ExternalIdentity, None when it has none."""
        told = identity_pb.ExternalIdentity.FromString(identity)
        if not told.bound:
            return None
        return cls(told.branch, told.protected_branch, told.pull_request)

    @property
    def scope(self) -> str:
        """Scope of the branch."""
        return self.branch or TEAM


def proven_branches(request: CreateRequest, identity: bytes) -> None:
    """Replace what a client says of its branches by what an identity provider proves.

    A target that is not proven is kept: it takes rights away, and gives none.
    """
    told = identity_pb.ExternalIdentity.FromString(identity)
    if told.bound:
        request.vcs_branch = told.branch
        request.vcs_target_branch = told.target_branch or request.vcs_target_branch


@dataclass(frozen=True)
class CacheMember:
    """Who asks.

    Attributes:
        name: of the member.
        role: of the member's token.
        bound: what is proven of the branch; None where the client is believed.
    """

    name: str
    role: int
    bound: BranchBound | None = None

    @classmethod
    def behind(cls, token: TokenRecord) -> CacheMember:
        """Return who stands behind a token, with what an identity provider proves of its run."""
        return cls(token.name, token.role, BranchBound.of(token.identity))

    @property
    def is_untrusted(self) -> bool:
        """Whether others must be protected from what this member builds."""
        return self.role not in (*_TRUSTED, identity_pb.ROLE_MEMBER)

    @property
    def is_trusted(self) -> bool:
        """Whether this member may write protected scopes."""
        return self.role in _TRUSTED

    @property
    def own_scope(self) -> str:
        """Scope that only this member writes, when it is untrusted."""
        return f"~{UNTRUSTED}{self.name}"


@dataclass(frozen=True)
class CacheTrust:
    """What a gateway's configuration says about branches.

    Attributes:
        default_branches: what every build reads after its own scope.
        protected_branches: patterns of branches that only administrators and pipelines write.
    """

    default_branches: Sequence[str]
    protected_branches: Sequence[str]

    def is_protected(self, name: str) -> bool:
        """Return whether a branch, or the scope of that name, is protected."""
        if name.startswith(f"~{UNTRUSTED}"):
            return False
        # A pattern such as "*" covers builds without a known branch as well.
        branch = "" if name == TEAM else name
        return any(fnmatchcase(branch, pattern) for pattern in self.protected_branches)

    def level(self, name: str) -> Level:
        """Return the level of a scope, given by its name without the project."""
        if name.startswith(f"~{UNTRUSTED}"):
            return Level.UNTRUSTED
        return Level.PROTECTED if self.is_protected(name) else Level.MEMBER

    def why_not_write(self, member: CacheMember, name: str) -> str:
        """Return why a member may not write a scope; empty when it may."""
        own = name == member.own_scope or name.startswith(f"{member.own_scope}/")
        if self.level(name) == Level.UNTRUSTED or member.is_untrusted:
            if member.is_untrusted and own:
                return ""
            if member.is_untrusted:
                return (
                    f'an untrusted member writes no cache scope but "{member.own_scope}" '
                    f'and those below it, not "{name}"'
                )
            return f'only the untrusted member it belongs to writes the cache scope "{name}"'
        if self.is_protected(name) and not member.is_trusted:
            return f'only administrators and pipelines write the protected cache scope "{name}"'
        bound = member.bound
        if bound is None or not self.is_protected(name):
            return ""
        if not bound.protected or name != bound.scope:
            return (
                f'the identity provider does not prove a run on the protected branch "{name}", '
                "so its cache scope is not written"
            )
        return ""


def check_branch(name: str, what: str = "branch") -> None:
    """Refuse what cannot be a branch and could be taken for a scope of ours.

    Raises:
        UsageError: with the name.
    """
    if len(name) > MAX_NAME:
        raise UsageError(f'the {what} "{name[:60]}..." has more than {MAX_NAME} characters')
    if _BRANCH_REFUSED.search(name):
        raise UsageError(
            f"{name[:100]!a} cannot be a {what}: git allows no ~ and no control characters"
        )


def check_scope_name(name: str) -> None:
    """Refuse what cannot be the name of a scope that a person chooses: as git does for branches.

    Source: git-check-ref-format(1).

    Raises:
        UsageError: with the name.
    """
    if not name or len(name) > MAX_NAME or _REFUSED.search(name):
        raise UsageError(
            f"{name[:100]!a} cannot be a cache scope; write it like the name of a branch"
        )


def scope_id(project_id: str, name: str) -> str:
    """Return "PROJECT/NAME" with the name percent-encoded, as tickets and the store have it.

    A name too long for an object's key is cut and gets a digest of the whole after a "~".
    """
    scope = f"{project_id}/{quote(name, safe='')}"
    if _fits(project_id, scope):
        return scope
    digest = hashlib.sha256(name.encode("utf-8")).hexdigest()[:32]
    kept = name[:_KEPT]
    while not _fits(project_id, scope := f"{project_id}/{quote(f'{kept}~{digest}', safe='')}"):
        kept = kept[:-1]
    return scope


def scope_name(scope: str) -> str:
    """Return the name of "PROJECT/NAME" as people write it."""
    return unquote(scope.partition("/")[2])


def may_promote(
    member: CacheMember, from_name: str, to_name: str, trust: CacheTrust
) -> tuple[str, str]:
    """Check who may copy the entries of one scope to another; return the two names.

    Single contributions are checked by the node that copies them.

    Args:
        member: who asks.
        from_name: of the scope with the entries, without the project.
        to_name: of the scope that gets them; empty for the first default branch.
        trust: the gateway's rules.

    Raises:
        AccessDeniedError: not this member, not from there, or not to there.
        UsageError: a name is none, or both are the same.
    """
    if not member.is_trusted:
        raise AccessDeniedError("only administrators and pipelines promote cache entries")
    to_name = to_name or next(iter(trust.default_branches), "")
    for name in (from_name, to_name):
        if name.startswith(f"~{UNTRUSTED}"):
            raise AccessDeniedError(
                f'"{name}" belongs to an untrusted member; its entries are never promoted'
            )
        if name != TEAM:
            check_scope_name(name)
    if from_name == to_name:
        raise UsageError(f'"{to_name}" cannot be promoted to itself; name two cache scopes')
    if reason := trust.why_not_write(member, to_name):
        raise AccessDeniedError(reason)
    return from_name, to_name


def may_prune(member: CacheMember, name: str, trust: CacheTrust) -> None:
    """Check who may remove entries of a scope.

    Args:
        member: who asks.
        name: of the scope, without the project; empty for all scopes of the project.
        trust: the gateway's rules.

    Raises:
        AccessDeniedError: the member may not write it, and is no administrator.
    """
    if member.role == identity_pb.ROLE_ADMIN:
        return
    if not name:
        raise AccessDeniedError("only an administrator may prune all scopes; name one with --scope")
    if "~" in name and name != TEAM and not name.startswith(f"~{UNTRUSTED}"):
        # A name that was cut: whether a pattern covers the whole of it cannot be told any more.
        raise AccessDeniedError(f'only an administrator may prune the cache scope "{name}"')
    if reason := trust.why_not_write(member, name):
        raise AccessDeniedError(f"{reason}, and only who writes a scope may prune it")


def _fits(project_id: str, scope: str) -> bool:
    try:
        packed_key(project_id, scope)
    except UsageError:
        return False
    return True
