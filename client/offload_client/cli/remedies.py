"""What to do about a failed build, where BuildKit and the node name the cause only. Pure.

What the node knows more of (hosts, logins, secrets, rights, memory) it has said itself.
"""

from __future__ import annotations

import re

from offload_core.errors import BuildFailedError, OffloadError, RegistryAuthError

_REMEDIES = (
    (r"exec format error", "the step's program is for another platform than the node has"),
    (r"no space left on device", "the node's disk is full: its administrator can prune the cache"),
    (
        r"syntax error in pattern",
        "a pattern in .dockerignore or of COPY is not well-formed: look for a [ without its ]",
    ),
    (
        r"unsupported request frontend\.",
        "the Dockerfile's frontend does not know this --call; it knows check, outline and targets",
    ),
)


def remedy(error: OffloadError) -> str:
    """Return what the person can do next; empty when the error itself says all there is."""
    if isinstance(error, RegistryAuthError):
        if "docker login" in error.message:
            return ""
        found = re.search(r"https?://([^/\s]+)/v2/", error.message)
        where = f" {found[1]}" if found else ""
        return f"log in first: docker login{where}; the login needs the right to do this"
    if not isinstance(error, BuildFailedError):
        return ""
    for pattern, advice in _REMEDIES:
        if re.search(pattern, error.message):
            return advice
    return ""
