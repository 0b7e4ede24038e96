"""Which registries a build writes to, and how image names lead to registries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_cache.mirror.upstream import DOCKER_HUB, origin_address
from offload_proto.v1.build_spec_pb2 import Output

if TYPE_CHECKING:
    from offload_proto.v1.build_spec_pb2 import BuildSpec

_HUB_NAMES = frozenset((DOCKER_HUB, "index.docker.io"))


def split_name(name: str) -> tuple[str, str]:
    """Return the registry's host, as BuildKit asks it, and the repository of an image name."""
    bare = name.partition("@")[0]
    first, slash, rest = bare.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = DOCKER_HUB, bare
    folder, slash, last = rest.rpartition("/")
    repository = f"{folder}{slash}{last.partition(':')[0]}"
    if first in _HUB_NAMES:
        repository = repository if "/" in repository else f"library/{repository}"
        first = origin_address(DOCKER_HUB)
    return first, repository


def push_targets(spec: BuildSpec) -> list[tuple[str, str]]:
    """Return host and repository of everything that a build pushes to a registry."""
    names: list[str] = []
    for output in spec.outputs:
        if output.type == Output.TYPE_REGISTRY:
            given = output.attributes.get("name", "")
            names += given.split(",") if given else spec.tags
    names += [
        cache.attributes["ref"]
        for cache in spec.cache_exports
        if cache.type == "registry" and cache.attributes.get("ref")
    ]
    return list(dict.fromkeys(split_name(name) for name in names))
