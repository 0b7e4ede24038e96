"""What a path of a synchronised directory leads to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from offload_core.errors import UsageError
from offload_proto.v1.session_sync_service_pb2 import (
    SYNC_KIND_ABSENT,
    SYNC_KIND_DIRECTORY,
    SYNC_KIND_FILE,
    SYNC_KIND_LINK,
    SYNC_KIND_OTHER,
    SyncEntry,
    SyncKind,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_PATH_BYTES = 3500
"""Leaves room for the root's own path within the 4096 bytes of the system's PATH_MAX."""
_MAX_NAME_BYTES = 255
_MAX_TARGET_BYTES = 4095
_DIGEST_BYTES = 32
_PERMISSIONS = 0o777
"""Not the setuid and setgid bits: a container could make programs that run as the member."""


class Entry(NamedTuple):
    """One path at one time; equal entries need no synchronisation.

    Attributes:
        kind: file, directory, symbolic link, something else, or nothing.
        mode: permissions of files and directories.
        size_bytes: of a file.
        modified_at_ns: of a file.
        sha256: of a file's content, or of its chunk list.
        target: of a symbolic link.
    """

    kind: SyncKind.ValueType
    mode: int = 0
    size_bytes: int = 0
    modified_at_ns: int = 0
    sha256: bytes = b""
    target: bytes = b""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.kind == SYNC_KIND_FILE

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == SYNC_KIND_DIRECTORY

    def same_content(self, other: Entry) -> bool:
        """Return whether at most permissions and times differ."""
        return (
            self.kind == other.kind
            and self.sha256 == other.sha256
            and self.target == other.target
            and self.size_bytes == other.size_bytes
        )


ABSENT = Entry(SYNC_KIND_ABSENT)
OTHER = Entry(SYNC_KIND_OTHER)

Listing = dict[str, Entry]
"""What is below a root, by relative path; names that are no UTF-8 have lone surrogates."""


def directory(mode: int) -> Entry:
    """Return the entry of a directory."""
    return Entry(SYNC_KIND_DIRECTORY, mode & _PERMISSIONS)


def link(target: bytes) -> Entry:
    """Return the entry of a symbolic link."""
    return Entry(SYNC_KIND_LINK, target=target)


def file(status: os.stat_result, sha256: bytes) -> Entry:
    """Return the entry of a file."""
    mode = status.st_mode & _PERMISSIONS
    return Entry(SYNC_KIND_FILE, mode, status.st_size, status.st_mtime_ns, sha256)


def parent_of(path: str) -> str:
    """Return the directory that holds a path, "" for the root."""
    return path.rpartition("/")[0]


def below(path: str, directory_path: str) -> bool:
    """Return whether a path is somewhere below a directory."""
    return not directory_path or path.startswith(f"{directory_path}/")


def check_path(data: bytes) -> str:
    """Return a path that the other side has named.

    Raises:
        UsageError: it is not clean, and so could lead out of the directory.
    """
    names = data.split(b"/")
    if (
        len(data) > MAX_PATH_BYTES
        or b"\0" in data
        or not all(0 < len(name) <= _MAX_NAME_BYTES and name not in (b".", b"..") for name in names)
    ):
        raise UsageError("the other side of a synchronised directory named an impossible path")
    return os.fsdecode(data)


def to_message(path: str, entry: Entry) -> SyncEntry:
    """Return what travels."""
    return SyncEntry(
        path=os.fsencode(path),
        kind=entry.kind,
        mode=entry.mode,
        size_bytes=entry.size_bytes,
        modified_at_ns=entry.modified_at_ns,
        sha256=entry.sha256,
        target=entry.target,
    )


def from_message(message: SyncEntry) -> tuple[str, Entry]:
    """Return a path and its entry, from the other side.

    Raises:
        UsageError: it makes no sense.
    """
    path = check_path(message.path)
    kind = message.kind
    entry: Entry | None = None
    if kind == SYNC_KIND_ABSENT:
        entry = ABSENT
    elif kind == SYNC_KIND_OTHER:
        entry = OTHER
    elif kind == SYNC_KIND_DIRECTORY:
        entry = directory(message.mode)
    elif kind == SYNC_KIND_LINK and 0 < len(message.target) <= _MAX_TARGET_BYTES:
        entry = link(message.target) if b"\0" not in message.target else None
    elif (
        kind == SYNC_KIND_FILE and message.size_bytes >= 0 and len(message.sha256) == _DIGEST_BYTES
    ):
        entry = Entry(
            SYNC_KIND_FILE,
            message.mode & _PERMISSIONS,
            message.size_bytes,
            message.modified_at_ns,
            message.sha256,
        )
    if entry is None:
        raise UsageError("the other side of a synchronised directory listed what cannot be")
    return path, entry


def update(listing: Listing, news: Mapping[str, Entry]) -> None:
    """Replace what a listing says of some paths."""
    for path, entry in news.items():
        if entry is ABSENT or entry == ABSENT:
            listing.pop(path, None)
        else:
            listing[path] = entry
