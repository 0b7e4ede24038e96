"""The protocol version in every call: who is too old hears so in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core import API_VERSION
from offload_core.errors import VersionError

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION_KEY = "offload-api-version"
"""Metadata key that carries the caller's `API_VERSION` in every call."""

MINIMUM_API_VERSION = 2


def check_version(metadata: Iterable[tuple[str, str | bytes]] | None, *, me: str) -> None:
    """Refuse a caller that speaks an older or newer protocol.

    Raises:
        VersionError: with a sentence that says which side has to be updated.
    """
    given = dict(metadata or ()).get(VERSION_KEY)
    try:
        version = int(given) if given is not None else 0
    except ValueError:
        version = 0
    if version < MINIMUM_API_VERSION:
        raise VersionError(
            f"this command is too old for {me}: it speaks version {version} of the protocol, "
            f"at least {MINIMUM_API_VERSION} is needed; install a newer offload-build"
        )
    if version > API_VERSION:
        raise VersionError(
            f"this command is newer than {me}: it speaks version {version} of the protocol, "
            f"{me} up to {API_VERSION}; ask your administrator to update the service"
        )


def call_metadata(*extra: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the metadata that every call of ours carries."""
    return ((VERSION_KEY, str(API_VERSION)), *extra)
