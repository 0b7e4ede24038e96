"""How the local sources of a build are called; client and node must agree."""

from __future__ import annotations

CONTEXT = "context"
DOCKERFILE = "dockerfile"
_OCI_PREFIX = "oci:"
_CACHE_PREFIX = "_cache"


def local_source_name(name: str) -> str:
    """Return the local source that serves the directory of the named context `name`.

    It is the name itself, unless that has another meaning among local sources; no named context
    begins with an underscore.
    """
    if name in (CONTEXT, DOCKERFILE) or name.startswith(_OCI_PREFIX):
        return f"_{name}"
    return name


def layout_source_name(name: str) -> str:
    """Return the local source that serves the OCI layout of the named context `name`."""
    return f"{_OCI_PREFIX}{name}"


def cache_source(number: int) -> str:
    """Return the name for the OCI layout of a cache; no named context begins with an underscore."""
    return f"{_CACHE_PREFIX}{number}"


def is_cache_source(name: str) -> bool:
    """Return whether `cache_source` makes this name."""
    digits = name.removeprefix(_CACHE_PREFIX)
    return name.startswith(_CACHE_PREFIX) and digits.isdecimal() and len(digits) <= 3
