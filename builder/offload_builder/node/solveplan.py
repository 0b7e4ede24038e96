"""From a user's request to BuildKit's: frontend attributes, exporters, cache keys. Pure.

Attribute names are those of BuildKit's dockerfile frontend (frontend/dockerfile/dockerfile2llb and
frontend/dockerui) and exporters (exporter/containerimage/exptypes).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.node.cacheplan import check_caches
from offload_builder.node.contextplan import (
    DOCKERFILE_KEY,
    check_contexts,
    context_attributes,
)
from offload_builder.node.flagplan import (
    attestation_attributes,
    call_attributes,
    check_flags,
    flag_attributes,
)
from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import BuildSpec, Output

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_proto.v1.node_service_pb2 import InlineFile

IMAGE_ATTRIBUTES = {
    # zstd: smaller and 3-4 times faster to make than gzip; a layer keeps its digest for ever.
    "compression": "zstd",
    "oci-mediatypes": "true",
    "push": "true",
    "store": "false",
}
EXPORT_ATTRIBUTES = {
    "mode": "max",
    "compression": "zstd",
    # Nobody waits for it, and everybody pulls it: a tenth smaller at half the pace.
    "compression-level": "7",
    "oci-mediatypes": "true",
    "image-manifest": "true",
    # A cache that cannot be written never fails a build.
    "ignore-error": "true",
}
_STREAMS = {
    Output.TYPE_LOCAL: "tar",
    Output.TYPE_TAR: "tar",
    Output.TYPE_OCI: "oci",
    Output.TYPE_DOCKER: "docker",
}
_FRONTEND_ATTRIBUTES = {
    DOCKERFILE_KEY: frozenset(("dockerfile",)),
    # One platform of several: the image is an index, and files go into a directory per platform.
    "multi-platform": frozenset(("true",)),
}
"""Attributes that a client may set beside the named fields of BuildSpec, with their values."""


@dataclass(frozen=True)
class Exporter:
    """One BuildKit exporter."""

    type: str
    attributes: dict[str, str]
    output_index: int
    """Index into BuildSpec.outputs."""
    streams: bool
    """Its bytes go to the client."""


def check_spec(spec: BuildSpec) -> None:
    """Refuse what this node does not understand, by name.

    Raises:
        UsageError: an attribute or output of a newer client.
    """
    for name, value in spec.frontend_attributes.items():
        if value not in _FRONTEND_ATTRIBUTES.get(name, ()):
            raise UsageError(f"this node does not know the frontend attribute {name!r}")
    for output in spec.outputs:
        if output.type == Output.TYPE_UNSPECIFIED or output.type not in Output.Type.values():
            raise UsageError("this node does not know one of the outputs; it is too old")
        if output.type in _STREAMS and _is_false(output.attributes.get("tar", "")):
            raise UsageError("an output with tar=false is not supported")
    check_contexts(spec)
    check_caches(spec)
    check_flags(spec)


def _is_false(text: str) -> bool:
    # As Go's strconv.ParseBool, with which BuildKit reads it.
    return text in ("0", "f", "F", "false", "False", "FALSE")


def frontend_attributes(spec: BuildSpec, *, use_cache: bool = True) -> dict[str, str]:
    """Return the attributes for the dockerfile frontend.

    Args:
        spec: the request.
        use_cache: False forgets --no-cache and attestations, for a solve that exports the cache
            of what was just built.
    """
    attributes = {"filename": spec.dockerfile_path, **spec.frontend_attributes}
    attributes |= context_attributes(spec)
    if spec.target:
        attributes["target"] = spec.target
    if spec.platforms:
        attributes["platform"] = ",".join(spec.platforms)
    if spec.no_cache and use_cache:
        attributes["no-cache"] = ""
    if spec.pull:
        attributes["image-resolve-mode"] = "pull"
    attributes |= {f"build-arg:{name}": value for name, value in spec.build_args.items()}
    attributes |= {f"label:{name}": value for name, value in spec.labels.items()}
    attributes |= flag_attributes(spec, use_cache=use_cache)
    if spec.call:
        return call_attributes(spec, attributes)
    return attributes | attestation_attributes(spec) if use_cache else attributes


def exporters(spec: BuildSpec, image_repository: str) -> list[Exporter]:
    """Return BuildKit's exporters for the outputs of a request.

    Args:
        spec: the request.
        image_repository: repository in the node's registry that takes the image.
    """
    found: list[Exporter] = []
    names = ",".join(spec.tags)
    has_image = False
    for index, output in enumerate(spec.outputs):
        given = dict(output.attributes)
        if output.type in _STREAMS:
            attributes = given
            if output.type in (Output.TYPE_OCI, Output.TYPE_DOCKER) and names:
                attributes["name"] = names
            found.append(Exporter(_STREAMS[output.type], attributes, index, streams=True))
        elif output.type == Output.TYPE_REGISTRY:
            attributes = {**given, "push": "true", "store": "false"}
            if names:
                attributes["name"] = names
            found.append(Exporter("image", attributes, index, streams=False))
        elif output.type == Output.TYPE_IMAGE and not has_image:
            has_image = True
            given.pop("name", None)
            attributes = {**given, **IMAGE_ATTRIBUTES, "name": f"{image_repository}:result"}
            attributes.setdefault("attestation-inline", "false")
            found.append(Exporter("image", attributes, index, streams=False))
    if spec.save_image and not has_image:
        attributes = {**IMAGE_ATTRIBUTES, "name": f"{image_repository}:result"}
        found.append(Exporter("image", attributes, len(spec.outputs), streams=False))
    return found


def cache_entry_key(spec: BuildSpec, native_platform: str) -> str:
    """Return what tells builds of one scope apart: definition, target, platforms.

    When not all that a scope has fits into one import, contributions of the build's own key stay.
    """
    platforms = ",".join(spec.platforms) or native_platform
    return _digest(spec.definition or spec.dockerfile_path, spec.target, platforms)


def shared_key_base(project_id: str, spec: BuildSpec, native_platform: str) -> str:
    """Return the name of BuildKit's copy of the local sources.

    One per definition, target and platforms: alternating COPY sets on one key make BuildKit drop
    and ask for files again and again.
    """
    return f"{project_id}-{cache_entry_key(spec, native_platform)}"


def likeness(spec: BuildSpec, inline: Iterable[InlineFile], native_platform: str) -> str:
    """Return what builds have in common that may be one build in directories of other names.

    Empty when the definition says more than such a name.
    """
    if not spec.definition_is_name:
        return ""
    dockerfiles = [
        hashlib.sha256(file.data).hexdigest()
        for file in inline
        if file.path == spec.dockerfile_path
    ]
    platforms = ",".join(spec.platforms) or native_platform
    return _digest(spec.dockerfile_path, spec.target, platforms, *dockerfiles)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class NameRewriter:
    """Replaces the build's capability in everything that people see.

    Vertex names and errors of BuildKit contain the full reference of what is pulled or pushed;
    the registry's address is of no use to people, and the capability must not reach a log.
    """

    def __init__(self, registry_address: str, capability: str) -> None:
        self._replacements = {
            f"{registry_address}/{capability}/cache:import": "the shared cache",
            f"{registry_address}/{capability}/cache:export": "the shared cache",
            f"{registry_address}/{capability}/image:result": "the pool's registry",
            f"{registry_address}/{capability}": "the pool's registry",
            capability: "***",
        }
        self._needle = capability

    def __call__(self, text: str) -> str:
        """Return the text without the capability."""
        if self._needle not in text:
            return text
        for old, new in self._replacements.items():
            text = text.replace(old, new)
        return text

    def response(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return an exporter response without the capability."""
        return {key: self(value) for key, value in values.items() if self._needle not in key}
