"""Errors about bake files that several readers share."""

from __future__ import annotations

from offload_core.errors import BakeError


def unsupported(what: str) -> BakeError:
    """Return the error for correct HCL, perhaps, that is beyond what is read here."""
    return BakeError(
        f"{what} is not supported without docker buildx",
        hint="install docker buildx, which reads all of HCL",
    )
