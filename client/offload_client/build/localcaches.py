"""Caches in directories of the client (`type=local`): OCI layouts that are read and written.

Source: BuildKit's client/solve.go (parseCacheOptions) and client/ociindex.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_client.build.cacheoptions import OtherCache
from offload_client.build.outputfiles import replace_file, write_file
from offload_client.bytepipe import in_thread
from offload_client.context.ocilayout import (
    DEFAULT_TAG,
    INDEX_FILE,
    LayoutReference,
    LayoutSource,
    find_image,
    read_document,
)
from offload_client.context.source import DirectorySource
from offload_client.goboolean import parse_boolean
from offload_client.load.fetch import verified_blob
from offload_client.load.image import Descriptor
from offload_client.load.progress import LoadMeter
from offload_core.contextnames import cache_source, layout_source_name
from offload_core.digest import digest_hex
from offload_core.errors import ConfigError, ContextError, InternalError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offload_client.context.source import ContextSource
    from offload_client.invocation import Invocation
    from offload_client.load.source import ImageSource
    from offload_proto.v1.build_spec_pb2 import ImageDescriptor

_TAG = "org.opencontainers.image.ref.name"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


@dataclass
class CacheSources:
    """The caches that a build reads, as the node takes them.

    Attributes:
        imports: in their order; those that are not there are left out, as with buildx.
        sources: directories of this machine, by local name.
        warnings: a sentence for each that was left out.
    """

    imports: list[OtherCache] = field(default_factory=list)
    sources: dict[str, ContextSource] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_local_caches(
    invocation: Invocation, imports: Sequence[OtherCache], index: Path | None
) -> CacheSources:
    """Locate the directories among the caches that a build reads.

    Args:
        invocation: for relative paths.
        imports: of the command line.
        index: the stat index of directories; None for none.
    """
    found = CacheSources()
    for cache in imports:
        if cache.type != "local":
            found.imports.append(cache)
            continue
        given = cache.attributes["src"]
        layout = invocation.path(given)
        reference = LayoutReference("")
        reference.tag = cache.attributes.get("tag") or DEFAULT_TAG
        reference.digest = cache.attributes.get("digest", "")
        try:
            digest = find_image(layout, reference)
        except ContextError as error:
            found.warnings.append(f"local cache import at {given} skipped: {error.message}")
            continue
        name = cache_source(len(found.sources))
        directory = DirectorySource(layout, index_path=index)
        found.sources[layout_source_name(name)] = LayoutSource(directory, layout, digest)
        found.imports.append(OtherCache("local", {"src": name, "digest": digest}))
    return found


def check_local_exports(invocation: Invocation, exports: Sequence[OtherCache]) -> None:
    """Refuse directories that no cache can be written to.

    Raises:
        InvalidValueError: a file is in the way, or an attribute has no meaning.
        ConfigError: the directory cannot be made.
    """
    for cache in exports:
        if cache.type != "local":
            continue
        folder = invocation.path(cache.attributes["dest"])
        if folder.exists() and not folder.is_dir():
            raise InvalidValueError(f"destination directory {folder} is a file")
        if parse_boolean(cache.attributes.get("image-manifest", "true")) is not True:
            raise InvalidValueError(
                "--cache-to type=local is written with image-manifest=true only"
            )
        if parse_boolean(cache.attributes.get("reset", "false")) is None:
            raise InvalidValueError("failed to parse reset attribute: write true or false")
        try:
            (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error.strerror}") from error


async def receive_cache(
    invocation: Invocation, cache: OtherCache, manifest: ImageDescriptor, source: ImageSource
) -> int:
    """Write a cache into its directory: the blobs that it lacks, then the name of the cache.

    Returns:
        Bytes that were received.

    Raises:
        ConfigError: the directory cannot be written.
        OffloadError: the node cannot be read.
    """
    folder = invocation.path(cache.attributes["dest"])
    meter = LoadMeter(lambda _progress: None)
    media_type, body = await source.manifest(manifest.digest)
    try:
        document: dict[str, Any] = json.loads(body)
        blobs = [
            Descriptor(str(item["mediaType"]), str(item["digest"]), int(item["size"]))
            for item in (*document.get("layers", ()), document["config"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError("the node wrote a cache manifest that cannot be read") from error
    for blob in {blob.digest: blob for blob in blobs}.values():
        path = _path(folder, blob.digest)
        if not (path.is_file() and path.stat().st_size == blob.size_bytes):
            async with aclosing(verified_blob(source, blob, meter)) as pieces:
                await write_file(path, pieces)
    root = Descriptor(media_type, manifest.digest, len(body))
    await in_thread(lambda: _finish(folder, cache, root, body), name="cache-layout")
    return meter.bytes_received


def _finish(folder: Path, cache: OtherCache, root: Descriptor, body: bytes) -> None:
    replace_file(_path(folder, root.digest), body.decode())
    replace_file(folder / "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}))
    tag = cache.attributes.get("tag") or DEFAULT_TAG
    entry = {
        "mediaType": root.media_type,
        "digest": root.digest,
        "size": root.size_bytes,
        "annotations": {_TAG: tag},
    }
    others = []
    if (folder / INDEX_FILE).exists():
        manifests = read_document(folder / INDEX_FILE).get("manifests") or []
        others = [item for item in manifests if (item.get("annotations") or {}).get(_TAG) != tag]
    document = {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": [*others, entry]}
    replace_file(folder / INDEX_FILE, json.dumps(document))
    if parse_boolean(cache.attributes.get("reset", "false")):
        _drop_unnamed(folder, document["manifests"])


def _drop_unnamed(folder: Path, manifests: object) -> None:
    """Remove the blobs that no manifest of the index names."""
    directory = DirectorySource(folder, index_path=None)
    named: set[Path] = set()
    for item in manifests if isinstance(manifests, list) else []:
        named |= set(LayoutSource(directory, folder, str(item["digest"])).blobs())
    for path in (folder / "blobs").glob("*/*"):
        if path not in named:
            path.unlink(missing_ok=True)


def _path(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest_hex(digest)
