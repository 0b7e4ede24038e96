"""The document of a cache mount in the shared store, which names all blobs it needs.

    projects/<project>/mounts/<scope>/<64 hex of the mount's name>

JSON: `version`, `id`, `base`, `platform`, `scope`, `tree` (digest), `blobs` (digest and bytes of
the tree and all pieces; these are what must be kept), `files`, `content_bytes`, `node`, `build_id`,
`created_at`, `cold` and `warm` (seconds that steps took which began with the mount empty, and with
content in it, by command).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from offload_builder.node.mounts.naming import MountName
from offload_core.digest import is_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DOCUMENT_BYTES = 4 << 20
MAX_COMMANDS = 64
_VERSION = 1


def command_key(arguments: Sequence[str]) -> str:
    """Return a short name of a step's command line."""
    return hashlib.sha256("\0".join(arguments).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class MountDocument:
    """A stored cache mount; see the module for the fields."""

    name: MountName
    scope: str
    tree: str
    blobs: tuple[tuple[str, int], ...]
    files: int
    content_bytes: int
    node: str
    build_id: str
    created_at: datetime
    cold: dict[str, float] = field(default_factory=dict)
    warm: dict[str, float] = field(default_factory=dict)

    @property
    def moved_bytes(self) -> int:
        """Return what a node without any of it has to fetch."""
        return sum(size for _, size in self.blobs)

    def encode(self) -> bytes:
        """Return the document."""
        return orjson.dumps(
            {
                "version": _VERSION,
                "id": self.name.id,
                "base": self.name.base,
                "platform": self.name.platform,
                "scope": self.scope,
                "tree": self.tree,
                "blobs": [{"digest": digest, "size": size} for digest, size in self.blobs],
                "files": self.files,
                "content_bytes": self.content_bytes,
                "node": self.node,
                "build_id": self.build_id,
                "created_at": self.created_at.isoformat(),
                "cold": self.cold,
                "warm": self.warm,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> MountDocument:
        """Read a document.

        Raises:
            UsageError: it is none.
        """
        try:
            return cls._decode(orjson.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this is no document of a cache mount: {error}") from error

    @classmethod
    def _decode(cls, found: dict[str, Any]) -> MountDocument:
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']!r}")
        created_at = datetime.fromisoformat(found["created_at"])
        blobs = tuple((str(item["digest"]), int(item["size"])) for item in found["blobs"])
        digests = [digest for digest, _ in blobs]
        tree = str(found["tree"])
        if not all(map(is_digest, digests)) or tree not in digests:
            raise ValueError("it names no tree")
        return cls(
            MountName(str(found["id"]), str(found["base"]), str(found["platform"])),
            str(found["scope"]),
            tree,
            blobs,
            int(found["files"]),
            int(found["content_bytes"]),
            str(found["node"]),
            str(found["build_id"]),
            created_at if created_at.tzinfo else created_at.replace(tzinfo=UTC),
            _seconds(found.get("cold", {})),
            _seconds(found.get("warm", {})),
        )


def _seconds(found: dict[str, Any]) -> dict[str, float]:
    latest = list(found.items())[-MAX_COMMANDS:]
    return {str(key): round(float(value), 2) for key, value in latest}


def experience(*known: dict[str, float]) -> dict[str, float]:
    """Return what is known of commands together; what comes later counts more."""
    merged: dict[str, float] = {}
    for seconds in known:
        merged |= seconds
    return _seconds(merged)
