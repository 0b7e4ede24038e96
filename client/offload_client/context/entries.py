"""What the client says about files, directories and links of the build context."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Mapping

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
        sha256: 32 bytes for a regular file: its digest, or that of its chunk list, see
            `offload_core.chunklist`; None for anything else, hard links included.
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


class FileRun(NamedTuple):
    """Regular files that follow each other in one directory, column by column.

    It stands for one `TreeEntry` per file, none of which has a link or attributes. An object per
    file would take longer than all that the operating system does in a scan.

    Attributes:
        prefix: what comes before each name: the directory's path with a "/", or nothing.
        names: of the files, UTF-8.
        modes: Go's os.FileMode encoding.
        sizes_bytes: of the files.
        modified_at_ns: in nanoseconds since 1970 UTC.
        sha256: 32 bytes for each file, empty ones included; as `TreeEntry.sha256`.
    """

    prefix: str
    names: list[str]
    modes: list[int]
    sizes_bytes: array[int]
    modified_at_ns: array[int]
    sha256: bytes


ContextItem: TypeAlias = TreeEntry | FileRun
"""What sources of a build context yield; `TreeEntry` says everything, `FileRun` is fast."""


def tree_entries(items: Iterable[ContextItem]) -> Iterator[TreeEntry]:
    """Yield one by one what the items stand for."""
    for item in items:
        if isinstance(item, TreeEntry):
            yield item
            continue
        for number, name in enumerate(item.names):
            yield TreeEntry(
                item.prefix + name,
                item.modes[number],
                item.sizes_bytes[number],
                item.modified_at_ns[number],
                "",
                item.sha256[32 * number : 32 * number + 32],
            )
