"""Names of objects in the shared store, relative to its prefix.

    projects/<project>/blobs/sha256/<64 hex>
    projects/<project>/scopes/<scope>/<entry key>.json
    projects/<project>/context/packs/<pack>
    projects/<project>/context/index/<pack>
    projects/<project>/context/used/<pack>

Scope and entry key are percent-encoded, so that a branch `a/b` is one path element and no name can
leave its project.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from offload_core.digest import digest_hex
from offload_core.errors import UsageError

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
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


def scope_prefix(project_id: str, scope: str) -> str:
    """Return what the keys of all entries of a scope begin with."""
    return f"projects/{check_project_id(project_id)}/scopes/{_element('cache scope', scope)}/"


def entry_key(project_id: str, scope: str, key: str) -> str:
    """Return the key of one cache entry."""
    return scope_prefix(project_id, scope) + _element("cache entry key", key, ".json")


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
