"""What the client says about one file, directory or link of the build context."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_XATTRS: Mapping[str, bytes] = MappingProxyType({})
"""Shared by all entries without extended attributes."""


@dataclass(slots=True)
class TreeEntry:
    """One entry of a build context; treat it as immutable.

    Attributes:
        path: relative, clean, UTF-8, with "/" as separator.
        mode: Go's os.FileMode encoding.
        size_bytes: bytes of a regular file; 0 for anything else, hard links included.
        modified_at_ns: modification time in nanoseconds since 1970 UTC.
        link_name: target of a symbolic link, or the path of an earlier entry with the same content
            for a hard link; empty otherwise.
        sha256: 32 bytes for a regular file; None for anything else, hard links included.
        xattrs: extended attributes that belong to the content.
        device_major: major number of a device, else 0.
        device_minor: minor number of a device, else 0.
    """

    path: str
    mode: int
    size_bytes: int
    modified_at_ns: int
    link_name: str = ""
    sha256: bytes | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=lambda: NO_XATTRS)
    device_major: int = 0
    device_minor: int = 0
