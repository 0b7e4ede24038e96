"""Reads a file once and gives its digest together with the status that belongs to it."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from offload_client.context.entries import NO_XATTRS
from offload_core.chunklist import MAX_LIST_BYTES
from offload_core.errors import ContextChangedError, ContextError
from offload_core.filedigest import ContentDigester
from offload_core.rootdir import open_beside

if TYPE_CHECKING:
    from collections.abc import Mapping

_ATTEMPTS = 3
_NO_FILE = frozenset({errno.EISDIR, errno.ESPIPE})
"""What reading a directory or a named pipe in the place of a file gives."""
_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})


class HashedFile(NamedTuple):
    """Digest, status and extended attributes of one and the same content.

    Attributes:
        sha256: of the content, or of the chunk list for a large file.
        status: the file's.
        xattrs: those that belong to the content.
        chunk_list: encoded; None for a file that is not large.
    """

    sha256: bytes
    status: os.stat_result
    xattrs: Mapping[str, bytes]
    chunk_list: bytes | None


class FileHasher:
    """Hashes regular files; for one thread at a time; closed by its owner."""

    def __init__(self) -> None:
        self._digester = ContentDigester()

    def close(self) -> None:
        """Free what large files need; harmless when done twice."""
        self._digester.close()

    def hash_file(
        self, directory_fd: int, name: str, path: str, status: os.stat_result
    ) -> HashedFile | None:
        """Return the digest of a file; None when it is gone.

        Args:
            directory_fd: open directory that holds the file.
            name: name in that directory.
            path: path for errors.
            status: as it was listed.

        Raises:
            ContextError: it cannot be read, or its chunk list would be too long.
            ContextChangedError: it keeps changing, or is no regular file any more.
        """
        try:
            fd = open_beside(directory_fd, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise changed(path, "it became a symbolic link") from error
            raise unreadable(path, error) from error
        try:
            for _ in range(_ATTEMPTS):
                digest, length, chunk_list = self._digester.digest(fd, status.st_size)
                after = os.fstat(fd)
                if length == status.st_size and _same(after, status):
                    if chunk_list is not None and len(chunk_list) > MAX_LIST_BYTES:
                        raise ContextError(
                            f'"{shown(path)}" is too large for a build context',
                            hint="list it in .dockerignore, or fetch it in a step of the build",
                        )
                    return HashedFile(digest, after, read_xattrs(fd), chunk_list)
                if not stat.S_ISREG(after.st_mode):
                    break
                status = after
        except OSError as error:
            if error.errno in _NO_FILE:
                raise changed(path, "it is no regular file any more") from error
            raise unreadable(path, error) from error
        finally:
            os.close(fd)
        raise changed(path, "it changes while it is read")


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (
        one.st_size == other.st_size
        and one.st_mtime_ns == other.st_mtime_ns
        and one.st_ctime_ns == other.st_ctime_ns
        and one.st_ino == other.st_ino
        and one.st_dev == other.st_dev
    )


def read_xattrs(target: int | str) -> Mapping[str, bytes]:
    """Return the extended attributes that belong to the content, by name.

    These are `security.capability` and `user.*`; the others describe this machine (labels of
    security modules, access lists). None where the file system has no extended attributes.

    Args:
        target: descriptor of a file, or path of a directory, which is not followed.

    Raises:
        OSError: they cannot be read.
    """
    if not hasattr(os, "listxattr"):
        return NO_XATTRS
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
        if not names:
            return NO_XATTRS
        return {
            name: os.getxattr(target, name, follow_symlinks=follow)
            for name in names
            if name == "security.capability" or name.startswith("user.")
        } or NO_XATTRS
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return NO_XATTRS
        raise


def shown(path: str) -> str:
    """Return a path for messages; bytes that are no UTF-8 become backslash escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def unreadable(path: str, error: OSError) -> ContextError:
    """Return the error for a file or directory that cannot be read."""
    return ContextError(
        f'cannot read "{shown(path)}" of the build context: {error.strerror}',
        hint="make it readable, or list it in .dockerignore when the build does not need it",
    )


def changed(path: str, what: str) -> ContextChangedError:
    """Return the error for a file that is not what it was."""
    return ContextChangedError(
        f'"{shown(path)}" of the build context changed during the build: {what}',
        hint="run the build again when nothing writes to the build context",
    )
