"""What one build adds to a cache scope: BuildKit's cache records, the layers they name, the writer.

A contribution is immutable. Its document holds the records themselves, so that one read is enough
to unite it with others, and names every blob that a reader may want: they are in the shared store
before the document is.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import zstandard

from offload_cache.keys import check_contribution_id
from offload_core.digest import check_digest
from offload_core.errors import UsageError

MAX_CONTRIBUTION_BYTES = 8 << 20
"""Of a document, packed or not; BuildKit itself takes no more than 1 MiB of records."""
_VERSION = 2
_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote a contribution, from which build.

    Attributes:
        build_id: the build that exported it.
        member: who ran that build.
        role: of that member: "admin", "member", "ci" or "untrusted".
        node_id: where it ran.
        branch: as the client said; empty when unknown.
        revision: as the client said; empty when unknown.
    """

    build_id: str
    member: str
    role: str
    node_id: str = ""
    branch: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer as BuildKit's cache manifest describes it: OCI image specification, "Descriptor".

    Attributes:
        digest: of the blob.
        size_bytes: of the blob.
        media_type: of the blob.
        annotations: BuildKit's, such as the digest of the unpacked layer.
    """

    digest: str
    size_bytes: int
    media_type: str
    annotations: dict[str, str]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one build added to one scope.

    Attributes:
        contribution_id: unique in the scope; see `offload_cache.keys.new_contribution_id`.
        scope: cache scope, "PROJECT/NAME".
        key: tells builds of one scope apart: definition, target, platforms.
        created_at: in UTC.
        writer: who wrote it.
        layers: every layer that the records name.
        records: BuildKit's cache configuration ("application/vnd.buildkit.cacheconfig.v0"), JSON.
        promoted_from: scope that it was copied from; empty when it was built for this one.
    """

    contribution_id: str
    scope: str
    key: str
    created_at: datetime
    writer: Writer
    layers: tuple[CacheLayer, ...]
    records: bytes
    promoted_from: str = ""

    @property
    def blobs(self) -> list[tuple[str, int]]:
        """Digests and sizes in bytes of everything that a reader may want."""
        return [(layer.digest, layer.size_bytes) for layer in self.layers]

    def to_bytes(self) -> bytes:
        """Return the document for the shared store: JSON in one zstd frame."""
        return zstandard.ZstdCompressor(level=_LEVEL).compress(orjson.dumps(self._document()))

    def _document(self) -> dict[str, Any]:
        writer = self.writer
        return {
            "version": _VERSION,
            "id": self.contribution_id,
            "scope": self.scope,
            "key": self.key,
            "created_at": self.created_at.astimezone(UTC).isoformat(),
            "writer": {
                "build_id": writer.build_id,
                "member": writer.member,
                "role": writer.role,
                "node_id": writer.node_id,
                "branch": writer.branch,
                "revision": writer.revision,
            },
            "promoted_from": self.promoted_from,
            "layers": [
                {
                    "digest": layer.digest,
                    "size": layer.size_bytes,
                    "mediaType": layer.media_type,
                    "annotations": layer.annotations,
                }
                for layer in self.layers
            ],
            "records": orjson.Fragment(self.records),
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Contribution:
        """Read a document of the shared store.

        Raises:
            UsageError: it is damaged, too large or of an unknown version.
        """
        try:
            decompressor = zstandard.ZstdDecompressor()
            if not 0 < zstandard.frame_content_size(data) <= MAX_CONTRIBUTION_BYTES:
                raise UsageError("a cache contribution is too large")
            return _read(orjson.loads(decompressor.decompress(data)))
        except (KeyError, TypeError, ValueError, AttributeError, zstandard.ZstdError) as error:
            raise UsageError("a cache contribution is damaged") from error


def _read(raw: dict[str, Any]) -> Contribution:
    if raw["version"] != _VERSION:
        raise UsageError(f"cache contributions of version {raw['version']!r} are not known")
    created_at = datetime.fromisoformat(raw["created_at"])
    if created_at.tzinfo is None:
        raise ValueError("a time without its zone")
    writer = raw["writer"]
    return Contribution(
        contribution_id=check_contribution_id(_text(raw["id"])),
        scope=_text(raw["scope"]),
        key=_text(raw["key"]),
        created_at=created_at,
        writer=Writer(
            build_id=_text(writer["build_id"]),
            member=_text(writer["member"]),
            role=_text(writer["role"]),
            node_id=_text(writer["node_id"]),
            branch=_text(writer["branch"]),
            revision=_text(writer["revision"]),
        ),
        layers=tuple(
            CacheLayer(
                digest=check_digest(layer["digest"]),
                size_bytes=_size(layer["size"]),
                media_type=_text(layer["mediaType"]),
                annotations={
                    _text(name): _text(value) for name, value in layer["annotations"].items()
                },
            )
            for layer in raw["layers"]
        ),
        records=orjson.dumps(raw["records"]),
        promoted_from=_text(raw["promoted_from"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("not a size")
    return value
