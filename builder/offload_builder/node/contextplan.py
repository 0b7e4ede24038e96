"""What a request says about its build contexts: checked, and as BuildKit's frontend attributes.

A client chooses among the forms that `docker buildx build` has; anything else that the frontend
would understand, such as another session or another input, is refused.
Source: BuildKit's frontend/dockerui (config.go, context.go, namedcontext.go).
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from offload_core.contextnames import layout_source_name, local_source_name
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from offload_proto.v1.build_spec_pb2 import BuildSpec

MAX_NAME_CHARACTERS = 512
MAX_VALUE_CHARACTERS = 8192
DOCKERFILE_KEY = "dockerfilekey"
"""Set to "dockerfile": the Dockerfile comes from the client although the context does not."""
_LAYOUT = "oci-layout://"
_IMAGE = "docker-image://"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_URL = re.compile(
    r"(?:(?:https?|git|ssh)://|github\.com/|[A-Za-z0-9_-]+@[A-Za-z0-9.-]+:)[^\x00-\x1f\x7f]+"
)
_DIGEST = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-fA-F]{32,}")


def check_contexts(spec: BuildSpec) -> None:
    """Refuse contexts that a request may not have.

    Raises:
        UsageError: with the name and the reason.
    """
    if spec.context_url and not _is_url(spec.context_url):
        raise UsageError("the build context is neither a git nor an http URL")
    in_context = bool(spec.context_url) and DOCKERFILE_KEY not in spec.frontend_attributes
    _check_dockerfile(spec.dockerfile_path, in_context=in_context)
    for name, value in spec.named_contexts.items():
        if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
            raise UsageError(f"bad name of a build context: {name[:MAX_NAME_CHARACTERS]!r}")
        if not _is_known(name, value):
            raise UsageError(f"this node does not know the kind of the build context {name!r}")


def _check_dockerfile(path: str, *, in_context: bool) -> None:
    parts = path.split("/") if in_context else [path]
    if not all(part and "/" not in part and part not in (".", "..") for part in parts):
        raise UsageError(f"bad Dockerfile name {path!r}")


def _is_url(text: str) -> bool:
    return len(text) <= MAX_VALUE_CHARACTERS and _URL.fullmatch(text) is not None


def _is_known(name: str, value: str) -> bool:
    if value.startswith(_LAYOUT):
        layout, _, digest = value.removeprefix(_LAYOUT).rpartition("@")
        return layout == name and _DIGEST.fullmatch(digest) is not None
    if value.startswith(_IMAGE):
        return len(value) <= MAX_VALUE_CHARACTERS
    return value == f"local:{local_source_name(name)}" or _is_url(value)


def context_attributes(spec: BuildSpec) -> dict[str, str]:
    """Return the frontend attributes for the contexts of a checked request."""
    attributes: dict[str, str] = {}
    if spec.context_url:
        attributes["context"] = spec.context_url
    for name, value in spec.named_contexts.items():
        source = value
        if value.startswith(_LAYOUT):
            source = f"{_LAYOUT}{store_id(name)}@{value.rpartition('@')[2]}"
        attributes[f"context:{name}"] = source
    if spec.named_contexts:
        # A frontend that is too old for them says so, and does not build without them.
        attributes["frontend.caps"] = "moby.buildkit.frontend.contexts+forward"
    return attributes


def layout_stores(spec: BuildSpec) -> dict[str, str]:
    """Return the local sources of a request's OCI layouts, by the name that BuildKit uses."""
    return {
        store_id(name): layout_source_name(name)
        for name, value in spec.named_contexts.items()
        if value.startswith(_LAYOUT)
    }


def layout_images(spec: BuildSpec) -> dict[str, str]:
    """Return the digests of the images in a request's OCI layouts, as `layout_stores`."""
    return {
        store_id(name): value.rpartition("@")[2]
        for name, value in spec.named_contexts.items()
        if value.startswith(_LAYOUT)
    }


def store_id(name: str) -> str:
    """Return a name for a layout that BuildKit takes for the repository of an image."""
    return hashlib.sha256(name.encode()).hexdigest()[:20]
