"""Image names as docker understands them: `[REGISTRY/]PATH[:TAG][@DIGEST]`.

Source: the grammar of the distribution project's reference package; a first part with a dot, a
colon or the name localhost is a registry, everything else lives at docker.io.
"""

from __future__ import annotations

import re

from offload_core.errors import UsageError

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")


def normalise_reference(name: str) -> str:
    """Return an image name with registry and tag: "app" becomes "docker.io/library/app:latest".

    Raises:
        UsageError: docker would refuse the name as well.
    """
    registry, path, tag = split_reference(name)
    return f"{registry}/{path}:{tag}"


def split_reference(name: str) -> tuple[str, str, str]:
    """Return registry, path and tag of an image name.

    Raises:
        UsageError: not a valid name.
    """
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        registry, remainder = first, rest
    else:
        registry, remainder = "docker.io", name
    path, _, tag = remainder.partition(":")
    if registry == "docker.io" and "/" not in path:
        path = f"library/{path}"
    if path != path.lower():
        raise UsageError(
            f'invalid tag "{name}": invalid reference format: repository name must be lowercase'
        )
    if (
        "@" in name
        or not _HOST.fullmatch(registry)
        or not _PATH.fullmatch(path)
        or not _TAG.fullmatch(tag or "latest")
        or (":" in remainder and not tag)
    ):
        raise UsageError(f'invalid tag "{name}": invalid reference format')
    return registry, path, tag or "latest"


def familiar_reference(name: str) -> str:
    """Return a normalised name as docker prints it: without docker.io/library."""
    return name.removeprefix("docker.io/").removeprefix("library/")
