"""Names of objects in the shared store, relative to its prefix.

    projects/<project>/blobs/sha256/<64 hex>
    projects/<project>/contributions/<scope>/<contribution>
    projects/<project>/packed/<scope>
    projects/<project>/used/<scope>/<entry key>
    projects/<project>/removed/<scope>/<contribution>
    projects/<project>/images/<64 hex of the manifest>
    projects/<project>/bases/<64 hex of a base image's name>
    projects/<project>/mounts/<scope>/<64 hex of the mount's name>
    projects/<project>/traces/<build>
    projects/<project>/leases/<lease>
    projects/<project>/condemned/<collection>
    pool/<name>
    projects/<project>/context/packs/<pack>
    projects/<project>/context/index/<pack>
    projects/<project>/context/used/<pack>

Scope and entry key are percent-encoded, so that a branch `a/b` is one path element and no name can
leave its project.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from offload_core.digest import digest_hex, sha256_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CONTRIBUTION = re.compile(r"[0-9a-f]{12}-[a-z0-9]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TIME_LIMIT = 1 << 48
_PACK = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}")
_MAX_ELEMENT_BYTES = 255  # longest path element of MinIO's and of common file systems


def check_project_id(project_id: str) -> str:
    """Return `project_id` when it can be part of a path.

    Raises:
        UsageError: it cannot.
    """
    if _PROJECT.fullmatch(project_id) is None:
        raise UsageError(
            f'"{project_id[:100]}" is no project id; use letters, digits, dot, dash, underscore'
        )
    return project_id


def _element(kind: str, name: str, suffix: str = "") -> str:
    # A dot is left alone by quote(), but "." and ".." are no names.
    element = quote(name, safe="").replace(".", "%2E") + suffix
    if not name or len(element) > _MAX_ELEMENT_BYTES:
        raise UsageError(f'the {kind} "{name[:60]}" is empty or too long')
    return element


def blob_key(project_id: str, digest: str) -> str:
    """Return the key of a blob."""
    return f"projects/{check_project_id(project_id)}/blobs/sha256/{digest_hex(digest)}"


def pack_prefix(project_id: str, kind: str) -> str:
    """Return what the keys of all objects of a kind begin with.

    Args:
        project_id: whose build contexts they are.
        kind: "packs", "index" or "used".
    """
    return f"projects/{check_project_id(project_id)}/context/{kind}/"


def pack_key(project_id: str, kind: str, pack: str) -> str:
    """Return the key of a pack, of its index, or of the mark of its last use.

    Raises:
        UsageError: `pack` is no name of a pack.
    """
    if _PACK.fullmatch(pack) is None:
        raise UsageError(f'"{pack[:100]}" is no name of a pack')
    return pack_prefix(project_id, kind) + pack


def new_contribution_id(created_at: datetime, build_id: str) -> str:
    """Return the name of what a build adds to a scope; newer names come first in key order.

    Raises:
        UsageError: `build_id` is no identifier of a build.
    """
    age = _TIME_LIMIT - 1 - int(created_at.timestamp() * 1000)
    return check_contribution_id(f"{age:012x}-{build_id}")


def check_contribution_id(contribution_id: str) -> str:
    """Return `contribution_id` when it is one.

    Raises:
        UsageError: it is none.
    """
    if _CONTRIBUTION.fullmatch(contribution_id) is None:
        raise UsageError(f'"{contribution_id[:100]}" is no name of a cache contribution')
    return contribution_id


def kind_prefix(project_id: str, kind: str) -> str:
    """Return what the keys of all objects of a kind begin with, in all scopes.

    Args:
        project_id: the project.
        kind: "blobs", "contributions", "packed", "used", "removed", "images", "bases", "mounts",
            "traces", "leases" or "condemned".
    """
    return f"projects/{check_project_id(project_id)}/{kind}/"


def contributions_prefix(project_id: str, scope: str, kind: str = "contributions") -> str:
    """Return what the keys of a scope's contributions begin with.

    Args:
        project_id: the project.
        scope: the scope.
        kind: "contributions", or "removed" for those that count no more.
    """
    return kind_prefix(project_id, kind) + _element("cache scope", scope) + "/"


def contribution_key(
    project_id: str, scope: str, contribution_id: str, kind: str = "contributions"
) -> str:
    """Return the key of what one build added to a scope."""
    return contributions_prefix(project_id, scope, kind) + check_contribution_id(contribution_id)


def packed_key(project_id: str, scope: str) -> str:
    """Return the key of the object that holds a scope's contributions together."""
    return kind_prefix(project_id, "packed") + _element("cache scope", scope)


def used_prefix(project_id: str, scope: str) -> str:
    """Return what the keys of a scope's marks of use begin with."""
    return contributions_prefix(project_id, scope, "used")


def used_key(project_id: str, scope: str, key: str) -> str:
    """Return the key of the empty object whose time says when an entry key was last of use."""
    return used_prefix(project_id, scope) + _element("cache entry key", key)


def image_key(project_id: str, digest: str) -> str:
    """Return the key of the document that keeps an image, by the digest of its manifest."""
    return kind_prefix(project_id, "images") + digest_hex(digest)


def base_key(project_id: str, name: str) -> str:
    """Return the key of the document that says what the name of a base image last meant."""
    return kind_prefix(project_id, "bases") + digest_hex(sha256_digest(name.encode()))


def mount_key(project_id: str, scope: str, name: str) -> str:
    """Return the key of the document of a cache mount; `name` is its 64 hex digits.

    Raises:
        UsageError: a name cannot be part of a key.
    """
    prefix = kind_prefix(project_id, "mounts") + _element("cache scope", scope)
    return f"{prefix}/{digest_hex(f'sha256:{name}')}"


def named_key(project_id: str, kind: str, name: str) -> str:
    """Return the key of a lease or of a list of condemned blobs.

    Raises:
        UsageError: `name` cannot be part of a key.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(f'"{name[:100]}" cannot be the name of an object')
    return kind_prefix(project_id, kind) + name


def scope_of(element: str) -> str:
    """Return the scope whose path element in a key this is."""
    return unquote(element)


def removed_image_key(project_id: str, digest: str) -> str:
    """Return where the document of a removed image stays for a while.

    No scope's path element is like this one: an escape has two hexadecimal digits.
    """
    return f"{kind_prefix(project_id, 'removed')}%images/{digest_hex(digest)}"
