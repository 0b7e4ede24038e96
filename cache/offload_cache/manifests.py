"""Reading image and cache manifests, whoever wrote them.

Source: OCI image specification 1.1, "Image Manifest" and "Image Index"; BuildKit writes its cache
as an image manifest whose configuration has the media type of `CACHE_CONFIG_TYPE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from offload_core.digest import is_digest
from offload_core.errors import UsageError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
CACHE_CONFIG_TYPE = "application/vnd.buildkit.cacheconfig.v0"

MAX_MANIFEST_BYTES = 4 << 20  # what registries accept by the distribution specification, 1.1

_IMAGES = {OCI_MANIFEST, DOCKER_MANIFEST}
_INDEXES = {OCI_INDEX, DOCKER_LIST}
_MAX_BLOB_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to content: OCI image specification, "Content Descriptors"."""

    digest: str
    size_bytes: int
    media_type: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest names.

    Attributes:
        media_type: one of the four that are served.
        config: None for an index.
        layers: in the manifest's order; empty for an index.
        children: manifests that an index names.
        document: the parsed JSON, unknown fields included.
    """

    media_type: str
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    children: tuple[Descriptor, ...]
    document: dict[str, Any]

    @property
    def blobs(self) -> list[Descriptor]:
        """Configuration and layers, each digest once."""
        found = {layer.digest: layer for layer in self.layers if not layer.foreign}
        if self.config is not None:
            found.setdefault(self.config.digest, self.config)
        return list(found.values())


def parse_manifest(data: bytes, content_type: str = "") -> Manifest:
    """Read a manifest or an index.

    Args:
        data: the JSON.
        content_type: its HTTP Content-Type, for documents that do not say what they are.

    Raises:
        UsageError: it is too large, no JSON, of a kind that is not served, or has broken fields.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise UsageError(f"a manifest may have {MAX_MANIFEST_BYTES} bytes, this has {len(data)}")
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise UsageError("the manifest is no JSON") from error
    if not isinstance(document, dict):
        raise UsageError("the manifest is no JSON object")
    declared = document.get("mediaType")
    given = content_type.partition(";")[0].strip()
    media_type = declared or given or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if declared and given in _IMAGES | _INDEXES and given != declared:
        raise UsageError("the manifest's mediaType differs from its Content-Type")
    if media_type in _INDEXES:
        children = _descriptors(document, "manifests")
        return Manifest(media_type, None, (), children, document)
    if media_type in _IMAGES:
        config = descriptor_of(document.get("config"))
        return Manifest(media_type, config, _descriptors(document, "layers"), (), document)
    raise UsageError("manifests of this media type are not served")


def parse_cache_manifest(data: bytes, content_type: str = "") -> Manifest:
    """Read a manifest of BuildKit's cache (`image-manifest=true`).

    Raises:
        UsageError: it is none.
    """
    manifest = parse_manifest(data, content_type)
    if manifest.config is None or manifest.config.media_type != CACHE_CONFIG_TYPE:
        raise UsageError("this is no cache manifest of BuildKit with image-manifest=true")
    return manifest


def _descriptors(document: dict[str, Any], name: str) -> tuple[Descriptor, ...]:
    raw = document.get(name, [])
    if not isinstance(raw, list):
        raise UsageError(f"the manifest's {name} are no list")
    return tuple(descriptor_of(item) for item in raw)


def descriptor_of(raw: Any) -> Descriptor:
    """Read a descriptor.

    Raises:
        UsageError: it is none, or its digest is no SHA-256 digest.
    """
    if not isinstance(raw, dict):
        raise UsageError("the manifest has a descriptor that is no object")
    digest, size_bytes, media_type = raw.get("digest"), raw.get("size"), raw.get("mediaType", "")
    if not isinstance(digest, str) or not is_digest(digest):
        raise UsageError("the manifest has a descriptor without a sha256 digest")
    if (
        not isinstance(size_bytes, int)
        or isinstance(size_bytes, bool)
        or not 0 <= size_bytes <= _MAX_BLOB_BYTES
    ):
        raise UsageError(f"the manifest's descriptor of {digest} has no valid size")
    if not isinstance(media_type, str):
        raise UsageError(f"the manifest's descriptor of {digest} has no valid media type")
    return Descriptor(digest, size_bytes, media_type, foreign=bool(raw.get("urls")))
