"""Read an image's index, manifests and configurations, and choose what an engine can use.

Sources: OCI image specification: "Image Index", "Image Manifest", "Image Layer Filesystem
Changeset", "Image Configuration" (layer ChainID). BuildKit marks attestation manifests with the
platform unknown/unknown and the annotation vnd.docker.reference.type.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from offload_client.load.fetch import small_blob
from offload_client.load.platform import Platform
from offload_core.digest import is_digest, sha256_digest
from offload_core.errors import ImageLoadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
_INDEX_TYPES = {OCI_INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"}
_MANIFEST_TYPES = {
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}
_MAX_MANIFEST_BYTES = 4 << 20
"""Limit of the OCI distribution specification, "Pushing Manifests"."""

_MAX_CONFIG_BYTES = 16 << 20
_REFERENCE = "vnd.docker.reference.digest"
_REFERENCE_TYPE = "vnd.docker.reference.type"

Compression = Literal["none", "gzip", "zstd"]


@dataclass(frozen=True)
class Descriptor:
    """Media type, digest and size of a piece of content."""

    media_type: str
    digest: str
    size_bytes: int

    @property
    def compression(self) -> Compression:
        """Compression of a layer, as its media type says."""
        if self.media_type.endswith(("gzip", ".gz")):
            return "gzip"
        return "zstd" if self.media_type.endswith("zstd") else "none"


@dataclass(frozen=True)
class Child:
    """An entry of an index."""

    descriptor: Descriptor
    platform: Platform | None
    attests: str | None
    """Digest of the manifest that this attestation is about."""


@dataclass(frozen=True)
class Layer:
    """A layer with the identifiers that graph drivers use."""

    descriptor: Descriptor
    diff_id: str
    chain_id: str


@dataclass(frozen=True)
class Manifest:
    """An image manifest with its exact bytes."""

    descriptor: Descriptor
    raw: bytes
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Configuration and layers."""
        return (self.config, *self.layers)


@dataclass(frozen=True)
class Root:
    """What a build's digest names: an index, or one manifest."""

    descriptor: Descriptor
    raw: bytes
    children: tuple[Child, ...]
    manifest: Manifest | None


@dataclass(frozen=True)
class PlatformImage:
    """The image of one platform, ready to be loaded."""

    manifest: Manifest
    config_raw: bytes
    platform: Platform
    layers: tuple[Layer, ...]


async def read_root(source: ImageSource, digest: str) -> Root:
    """Read the index or manifest that `digest` names.

    Raises:
        ImageLoadError: damaged, or no image.
    """
    media_type, raw = await source.manifest(digest)
    descriptor, content = _checked(media_type, raw, digest)
    if descriptor.media_type in _INDEX_TYPES:
        entries = content.get("manifests")
        if not isinstance(entries, list):
            raise ImageLoadError(f"the image index {digest} has no list of manifests")
        return Root(descriptor, raw, tuple(_child(entry) for entry in entries), None)
    return Root(descriptor, raw, (), _manifest(descriptor, raw, content))


async def read_manifest(source: ImageSource, wanted: Descriptor) -> Manifest:
    """Read an image manifest of an index."""
    media_type, raw = await source.manifest(wanted.digest)
    descriptor, content = _checked(media_type or wanted.media_type, raw, wanted.digest)
    return _manifest(descriptor, raw, content)


async def read_platform_image(
    source: ImageSource, manifest: Manifest, meter: LoadMeter
) -> PlatformImage:
    """Read an image's configuration and join its layers with their identifiers."""
    raw = await small_blob(source, manifest.config, _MAX_CONFIG_BYTES, meter)
    config = _json(raw, manifest.config.digest)
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(
        isinstance(diff_id, str) and is_digest(diff_id) for diff_id in diff_ids
    ):
        raise ImageLoadError(
            f"the configuration of image {manifest.descriptor.digest} has no diffs"
        )
    if len(diff_ids) != len(manifest.layers):
        raise ImageLoadError(
            f"image {manifest.descriptor.digest} lists {len(manifest.layers)} layers, its "
            f"configuration {len(diff_ids)}; build it again"
        )
    layers = tuple(
        Layer(descriptor, diff_id, chain_id)
        for descriptor, diff_id, chain_id in zip(
            manifest.layers, diff_ids, chain_ids(diff_ids), strict=True
        )
    )
    platform = Platform.of(
        str(config.get("os") or "linux"),
        str(config.get("architecture") or "amd64"),
        str(config.get("variant") or ""),
    )
    return PlatformImage(manifest, raw, platform, layers)


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """Return the chain id of every layer: the first is its diff id, the next hash with the last.

    Source: OCI image specification, "Image Configuration", "Layer ChainID".
    """
    chains: list[str] = []
    for diff_id in diff_ids:
        if not chains:
            chains.append(diff_id)
            continue
        joined = f"{chains[-1]} {diff_id}".encode()
        chains.append("sha256:" + hashlib.sha256(joined).hexdigest())
    return chains


def choose_children(root: Root, wanted: Sequence[Platform], default: Platform) -> tuple[Child, ...]:
    """Choose the manifests of an index for the wanted platforms.

    Without a wish: the only image if there is one, else that of the engine's own platform.

    Raises:
        ImageLoadError: a wanted platform was not built; the sentence names what was.
    """
    images = [child for child in root.children if child.attests is None]
    if not images:
        raise ImageLoadError(f"the image index {root.descriptor.digest} has no image in it")
    if not wanted:
        if len(images) == 1:
            return (images[0],)
        wanted = [default]
    chosen: list[Child] = []
    for platform in wanted:
        match = next((child for child in images if child.platform == platform), None)
        if match is None:
            match = next((child for child in images if _serves(child.platform, platform)), None)
        if match is None:
            built = ", ".join(str(child.platform) for child in images)
            raise ImageLoadError(f"the image was not built for {platform}, only for {built}")
        if match not in chosen:
            chosen.append(match)
    return tuple(chosen)


def _serves(built: Platform | None, wanted: Platform) -> bool:
    """Return whether an image whose platform is not exactly the wanted one will do."""
    return built is None or (
        not wanted.variant and (built.os, built.architecture) == (wanted.os, wanted.architecture)
    )


def _checked(media_type: str, raw: bytes, digest: str) -> tuple[Descriptor, dict[str, Any]]:
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise ImageLoadError(f"manifest {digest} is larger than {_MAX_MANIFEST_BYTES} bytes")
    if sha256_digest(raw) != digest:
        raise ImageLoadError(f"manifest {digest} arrived damaged; run the build again")
    content = _json(raw, digest)
    named = content.get("mediaType")
    kind = named if isinstance(named, str) and named else media_type
    if kind not in _INDEX_TYPES | _MANIFEST_TYPES:
        raise ImageLoadError(f'{digest} is no container image but "{kind}"')
    return Descriptor(kind, digest, len(raw)), content


def _manifest(descriptor: Descriptor, raw: bytes, content: Mapping[str, Any]) -> Manifest:
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise ImageLoadError(f"manifest {descriptor.digest} has no list of layers")
    return Manifest(
        descriptor,
        raw,
        _descriptor(content.get("config")),
        tuple(_descriptor(layer) for layer in layers),
    )


def _child(entry: object) -> Child:
    descriptor = _descriptor(entry)
    fields = entry if isinstance(entry, dict) else {}
    annotations = fields.get("annotations")
    if not isinstance(annotations, dict):
        annotations = {}
    platform = None
    if isinstance(named := fields.get("platform"), dict):
        platform = Platform.of(
            str(named.get("os") or ""),
            str(named.get("architecture") or ""),
            str(named.get("variant") or ""),
        )
    attests = None
    if platform == Platform("unknown", "unknown") or _REFERENCE_TYPE in annotations:
        attests = str(annotations.get(_REFERENCE) or "")
    return Child(descriptor, platform, attests)


def _descriptor(entry: object) -> Descriptor:
    fields = entry if isinstance(entry, dict) else {}
    media_type, digest, size = (fields.get(key) for key in ("mediaType", "digest", "size"))
    if not (
        isinstance(media_type, str)
        and isinstance(digest, str)
        and is_digest(digest)
        and isinstance(size, int)
        and size >= 0
    ):
        raise ImageLoadError(f"the image's manifest has a wrong descriptor: {str(entry)[:200]}")
    return Descriptor(media_type, digest, size)


def _json(raw: bytes, digest: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ImageLoadError(f"{digest} of the image is not valid JSON") from error
    if not isinstance(content, dict):
        raise ImageLoadError(f"{digest} of the image is not a JSON object")
    return content
