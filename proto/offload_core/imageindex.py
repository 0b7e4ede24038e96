"""Joining image indexes that several builders made for different platforms.

The result is what one BuildKit writes when it builds all platforms (exporter/containerimage/
writer.go): images in the order in which they were asked for, then the attestations about them;
JSON with the fields in the order of Go's structs, indented by two blanks. So an image has the same
digest whether one node builds it or several do.
Sources: OCI image specification, "Image Index"; OCI image-spec, specs-go/v1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_core.digest import is_digest, sha256_digest
from offload_core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
MAX_INDEX_BYTES = 4 << 20
"""Limit of the OCI distribution specification, "Pushing Manifests"."""

_DESCRIPTOR_FIELDS = (
    "mediaType", "digest", "size", "urls", "annotations", "data", "platform", "artifactType"
)  # fmt: skip
_PLATFORM_FIELDS = ("architecture", "os", "os.version", "os.features", "variant")
_ATTESTS = "vnd.docker.reference.digest"
_SUBSTITUTES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
_ESCAPED = str.maketrans(_SUBSTITUTES | {"\u2029": "\\u2029"})
"""What Go's encoder writes of characters that could end a script in a page."""


@dataclass(frozen=True)
class JoinedIndex:
    """An index that names the images of several others."""

    media_type: str
    raw: bytes
    children: tuple[str, ...]
    """Digests of the manifests that it names."""

    @property
    def digest(self) -> str:
        """Of the exact bytes."""
        return sha256_digest(self.raw)

    def descriptor(self, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return what refers to it, as BuildKit tells it in its answers."""
        found: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": len(self.raw),
        }
        if annotations:
            found["annotations"] = dict(sorted(annotations.items()))
        return found


def join_indexes(parts: Sequence[bytes], platforms: Sequence[str]) -> JoinedIndex:
    """Return one index with the images of all parts.

    Args:
        parts: indexes, as they were written.
        platforms: the order of the images, as "linux/arm64"; images of others come behind them.

    Raises:
        InternalError: a part is no image index.
    """
    images: dict[str, dict[str, Any]] = {}
    attestations: dict[str, dict[str, Any]] = {}
    annotations: dict[str, str] = {}
    types: set[str] = set()
    for part in parts:
        index = _read(part)
        types.add(index["mediaType"])
        annotations |= index.get("annotations") or {}
        for entry in index["manifests"]:
            about = (entry.get("annotations") or {}).get(_ATTESTS)
            (images if about is None else attestations).setdefault(entry["digest"], entry)
    wanted = {_plain(name): number for number, name in enumerate(platforms)}

    def place(entry: Mapping[str, Any]) -> int:
        return wanted.get(_plain(_name(entry)), len(wanted))

    ordered = sorted(images.values(), key=place)
    position = {entry["digest"]: number for number, entry in enumerate(ordered)}
    notes = sorted(
        attestations.values(),
        key=lambda entry: position.get(entry["annotations"][_ATTESTS], len(position)),
    )
    entries = [*ordered, *notes]
    media_type = DOCKER_LIST if types == {DOCKER_LIST} else OCI_INDEX
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type}
    document["manifests"] = [_in_order(entry) for entry in entries]
    if annotations:
        document["annotations"] = dict(sorted(annotations.items()))
    text = json.dumps(document, indent=2, ensure_ascii=False).translate(_ESCAPED)
    return JoinedIndex(media_type, text.encode(), tuple(entry["digest"] for entry in entries))


def _read(raw: bytes) -> dict[str, Any]:
    try:
        index = json.loads(raw)
        index.setdefault("mediaType", OCI_INDEX)
        sound = index["mediaType"] in INDEX_TYPES and all(
            is_digest(entry["digest"]) and isinstance(entry["size"], int)
            for entry in index["manifests"]
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise InternalError("a node made something else than an image index for its platforms")
    found: dict[str, Any] = index
    return found


def _in_order(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: entry[name] for name in _DESCRIPTOR_FIELDS if entry.get(name)}
    found |= {name: entry[name] for name in entry if name not in found and entry[name]}
    found["size"] = entry["size"]
    if "annotations" in found:
        found["annotations"] = dict(sorted(found["annotations"].items()))
    if platform := found.get("platform"):
        found["platform"] = {name: platform[name] for name in _PLATFORM_FIELDS if name in platform}
    return found


def _name(entry: Mapping[str, Any]) -> str:
    platform = entry.get("platform") or {}
    parts = (platform.get("os"), platform.get("architecture"), platform.get("variant"))
    return "/".join(str(part) for part in parts if part)


def _plain(platform: str) -> str:
    """Return a platform without the variant that its architecture has anyway."""
    for suffix in ("arm64/v8", "amd64/v1"):
        if platform.endswith(suffix):
            return platform.rpartition("/")[0]
    return platform + "/v7" if platform.endswith("/arm") else platform
