"""Caches beside the pool's own, as a request names them: checked, and as BuildKit takes them. Pure.

BuildKit reads and writes them itself. A cache in a directory of the client is read through the
session's content service, and written to the node's registry, from where the client takes it.
Source: BuildKit's cache/remotecache (registry, local, inline, gha, s3, azblob).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.solve import Attributed
from offload_builder.node.contextplan import store_id
from offload_core.contextnames import is_cache_source, layout_source_name
from offload_core.digest import is_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_proto.v1.build_spec_pb2 import BuildSpec, CacheOption

MAX_CACHES = 16
MAX_VALUE_CHARACTERS = 16384
LOCAL_TAG = "cache-"
"""What the tags of caches for directories of the client begin with."""
_NEEDED = {
    "registry": ("ref",),
    "local": (),
    "inline": (),
    "gha": ("token",),
    # Without keys BuildKit would look for those of the node.
    "s3": ("bucket", "access_key_id", "secret_access_key"),
    "azblob": ("secret_access_key",),
}


def check_caches(spec: BuildSpec) -> None:
    """Refuse caches that a request may not have.

    Raises:
        UsageError: with the kind and the reason.
    """
    if max(len(spec.cache_imports), len(spec.cache_exports)) > MAX_CACHES:
        raise UsageError(f"a build may read and write {MAX_CACHES} caches beside the pool's")
    for cache in (*spec.cache_imports, *spec.cache_exports):
        _check(cache)
    for cache in spec.cache_imports:
        if cache.type == "inline":
            raise UsageError("an inline cache is read with type=registry")
        if cache.type == "local" and not (
            is_cache_source(cache.attributes.get("src", ""))
            and is_digest(cache.attributes.get("digest", ""))
        ):
            raise UsageError("a cache in a directory of the client is named in a wrong way")
    for cache in spec.cache_exports:
        if cache.type == "local" and not cache.attributes.keys().isdisjoint(("dest", "src")):
            raise UsageError("a cache in a directory of the client is named in a wrong way")


def _check(cache: CacheOption) -> None:
    check_cache(cache.type, cache.attributes)


def check_cache(kind: str, attributes: Mapping[str, str]) -> None:
    """Refuse a kind of cache that is not known, or that would be read with the node's keys.

    Raises:
        UsageError: with the kind and the reason.
    """
    needed = _NEEDED.get(kind)
    if needed is None:
        raise UsageError(f"this node does not know the kind of cache {kind[:40]!r}")
    for name in needed:
        if not attributes.get(name):
            raise UsageError(f"a cache of type={kind} needs {name}")
    if any(len(value) > MAX_VALUE_CHARACTERS for value in attributes.values()):
        raise UsageError(f"an attribute of a cache of type={kind} is too long")


def cache_stores(spec: BuildSpec) -> dict[str, str]:
    """Return the local sources of the client's caches, by the name that BuildKit uses."""
    names = [cache.attributes["src"] for cache in spec.cache_imports if cache.type == "local"]
    return {store_id(name): layout_source_name(name) for name in names}


def other_imports(spec: BuildSpec) -> list[Attributed]:
    """Return what BuildKit imports beside the pool's cache, in the order of the command line."""
    found = []
    for cache in spec.cache_imports:
        attributes = dict(cache.attributes)
        if cache.type == "local":
            attributes["src"] = store_id(attributes["src"])
        found.append(Attributed(cache.type, attributes))
    return found


def other_exports(spec: BuildSpec, image_repository: str) -> list[Attributed]:
    """Return what BuildKit exports beside the pool's cache.

    Args:
        spec: the request.
        image_repository: repository in the node's registry that takes caches for the client.
    """
    found = []
    for index, cache in enumerate(spec.cache_exports):
        attributes = dict(cache.attributes)
        if cache.type != "local":
            found.append(Attributed(cache.type, attributes))
            continue
        attributes |= {"ref": f"{image_repository}:{LOCAL_TAG}{index}", "image-manifest": "true"}
        found.append(Attributed("registry", attributes))
    return found


def local_export_index(tag: str) -> int | None:
    """Return which export a tag of the node's registry belongs to, None when to none."""
    digits = tag.removeprefix(LOCAL_TAG)
    return int(digits) if tag.startswith(LOCAL_TAG) and digits.isdecimal() else None
