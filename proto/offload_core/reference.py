"""Image names as docker understands them: `[REGISTRY/]PATH[:TAG]`.

Source: the grammar of the distribution project's reference package; a first part with a dot, a
colon, a capital letter or the name localhost is a registry, everything else lives at docker.io,
which has the older name index.docker.io.
"""

from __future__ import annotations

import re

from offload_core.errors import InvalidValueError

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_CHARACTERS = 255
_HUB = "docker.io"
_HUB_NAMES = (_HUB, "index.docker.io")


def normalise_reference(name: str) -> str:
    """Return an image name with registry and tag: "app" becomes "docker.io/library/app:latest".

    Raises:
        InvalidValueError: docker would refuse the name as well.
    """
    registry, path, tag = split_reference(name)
    return f"{registry}/{path}:{tag}"


def split_reference(name: str) -> tuple[str, str, str]:
    """Return registry, path and tag of an image name.

    Raises:
        InvalidValueError: not a valid name.
    """
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        registry, remainder = first, rest
    else:
        registry, remainder = _HUB, name
    if registry in _HUB_NAMES:
        registry = _HUB
    path, colon, tag = remainder.partition(":")
    if registry == _HUB and "/" not in path:
        path = f"library/{path}"
    if "@" in name:
        raise _invalid(name, "a name for a new image cannot have a digest")
    if path != path.lower():
        raise _invalid(name, "repository name must be lowercase")
    if not _HOST.fullmatch(registry) or not _PATH.fullmatch(path):
        raise _invalid(name)
    if (colon or tag) and not _TAG.fullmatch(tag):
        raise _invalid(name)
    if len(registry) + 1 + len(path) > _MAX_CHARACTERS:
        raise _invalid(name, f"repository name must not be more than {_MAX_CHARACTERS} characters")
    if _DIGEST.fullmatch(name):
        raise _invalid(name, "it looks like an image ID")
    return registry, path, tag or "latest"


def familiar_reference(name: str) -> str:
    """Return a normalised name as docker prints it: without docker.io/library where that is clear.

    What is returned always means the same image again.
    """
    for prefix in (f"{_HUB}/library/", f"{_HUB}/"):
        short = name.removeprefix(prefix)
        if short != name and normalise_reference(short) == name:
            return short
    return name


def _invalid(name: str, problem: str = "") -> InvalidValueError:
    detail = f": {problem}" if problem else ""
    return InvalidValueError(f'invalid tag "{name}": invalid reference format{detail}')
