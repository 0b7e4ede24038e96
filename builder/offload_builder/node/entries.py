"""What a node accepts as a listing of a build context: clean paths, whole digests, honest sizes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_core.errors import UsageError
from offload_core.filemode import MODE_SOCKET, MODE_SYMLINK, is_regular

if TYPE_CHECKING:
    from offload_proto.v1.node_service_pb2 import ContextEntry

SHA256_BYTES = 32
MAX_PATH_CHARACTERS = 4096
"""Linux's PATH_MAX."""
_BAD_PATH = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0")


def check_path(path: str) -> None:
    """Refuse a path that is not relative, clean and below its root.

    Raises:
        UsageError: with the path.
    """
    if _BAD_PATH.search(path) or len(path) > MAX_PATH_CHARACTERS:
        raise UsageError(f"the client sent a build context with the bad path {path[:200]!r}")


def check_entry(entry: ContextEntry) -> None:
    """Refuse an entry that no honest client sends.

    Raises:
        UsageError: with the path.
    """
    path, digest, size = entry.path, entry.sha256, entry.size_bytes
    check_path(path)
    if size < 0 or (digest and len(digest) != SHA256_BYTES):
        raise UsageError(f"the client sent a malformed entry for {path[:200]!r}")
    if link_name := entry.link_name:
        if not entry.mode & MODE_SYMLINK:
            check_path(link_name)
        elif "\0" in link_name:
            raise UsageError(f"the client sent a malformed link for {path[:200]!r}")
    elif size and not digest and is_regular(entry.mode & ~MODE_SOCKET):
        raise UsageError(f"the client sent no digest for {path[:200]!r}")
