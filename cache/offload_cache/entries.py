"""Cache entries: the small documents that say which manifest a scope holds under a key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from offload_core.digest import is_digest
from offload_core.errors import UsageError

MAX_ENTRY_BYTES = 4 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One cache manifest of a scope.

    Attributes:
        scope: name of the scope, for example a branch.
        key: what tells builds of a scope apart: target, platforms, Dockerfile.
        manifest_digest: of the manifest blob.
        media_type: of the manifest.
        size_bytes: of the manifest.
        config_digest: BuildKit's cache records.
        blobs: digest and size of the configuration and all layers that existed when this was
            written; it is written after them.
        created_at: in UTC; the newest entry of a scope and key holds.
        build_id: the build that exported it.
        member: who ran that build.
    """

    scope: str
    key: str
    manifest_digest: str
    media_type: str
    size_bytes: int
    config_digest: str
    blobs: tuple[tuple[str, int], ...]
    created_at: datetime
    build_id: str
    member: str

    def to_json(self) -> bytes:
        """Return the document for the shared store."""
        return orjson.dumps(
            {
                "version": _VERSION,
                "scope": self.scope,
                "key": self.key,
                "manifest": {
                    "digest": self.manifest_digest,
                    "mediaType": self.media_type,
                    "size": self.size_bytes,
                },
                "config": self.config_digest,
                "blobs": [{"digest": digest, "size": size} for digest, size in self.blobs],
                "created_at": self.created_at.astimezone(UTC).isoformat(),
                "build_id": self.build_id,
                "member": self.member,
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> CacheEntry:
        """Read a document from the shared store.

        Raises:
            UsageError: it is damaged or of an unknown version.
        """
        try:
            raw: dict[str, Any] = orjson.loads(data)
            if raw["version"] != _VERSION:
                raise UsageError(f"cache entries of version {raw['version']!r} are not known")
            manifest = raw["manifest"]
            entry = cls(
                scope=_text(raw["scope"]),
                key=_text(raw["key"]),
                manifest_digest=_digest(manifest["digest"]),
                media_type=_text(manifest["mediaType"]),
                size_bytes=_size(manifest["size"]),
                config_digest=_digest(raw["config"]),
                blobs=tuple(
                    (_digest(blob["digest"]), _size(blob["size"])) for blob in raw["blobs"]
                ),
                created_at=datetime.fromisoformat(raw["created_at"]),
                build_id=_text(raw["build_id"]),
                member=_text(raw["member"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError("a cache entry is damaged") from error
        if entry.created_at.tzinfo is None:
            raise UsageError("a cache entry has a time without its zone")
        return entry


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _digest(value: Any) -> str:
    if not is_digest(_text(value)):
        raise ValueError("not a digest")
    return _text(value)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("not a size")
    return value
