"""Opens files below a directory without ever leaving it.

Paths are opened element by element and no element may be a symbolic link, so that a directory
that is replaced by a link while it is read cannot lead outside.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP = _DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK: a named pipe that took a file's place must not hold us up."""


class RootDirectory:
    """An open root directory; for one thread at a time; closed by its owner."""

    def __init__(self, root: Path) -> None:
        """Open the root; it may itself be a symbolic link.

        Raises:
            OSError: it is no directory or cannot be opened.
        """
        self.path = os.path.realpath(root)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._parent = ""
        self._parent_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; harmless when done twice."""
        self.forget()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def status(self) -> os.stat_result:
        """Return the status of the root itself."""
        return os.fstat(self._fd)

    def open_directory(self, path: str) -> int:
        """Return a descriptor of a directory, "" for the root; the caller closes it.

        Raises:
            OSError: as `os.open`; ENOTDIR or ELOOP where a symbolic link is met.
        """
        if not path:
            return os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=self._fd)
        parent, _, name = path.rpartition("/")
        return os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=self.beside(parent))

    def open_file(self, path: str) -> int:
        """Return a read-only descriptor of a file; the caller closes it.

        The directory is kept open for the next file, which is often its neighbour.

        Raises:
            OSError: as `os.open`; ENOTDIR or ELOOP where a symbolic link is met.
        """
        parent, _, name = path.rpartition("/")
        return open_beside(self.beside(parent), name)

    def absolute(self, path: str) -> str:
        """Return the path as the system knows it; it is not protected against links."""
        return f"{self.path}/{path}" if path else self.path

    def beside(self, path: str) -> int:
        """Return a descriptor of a directory, "" for the root, for calls with `dir_fd` only.

        It is kept until another directory is asked for, or until `forget`; then it is closed.

        Raises:
            OSError: as `os.open`; ENOTDIR or ELOOP where a symbolic link is met.
        """
        if not path:
            return self._fd
        if self._parent_fd >= 0 and path == self._parent:
            return self._parent_fd
        # From the kept directory where that is an ancestor, which it is in most tree walks.
        if self._parent_fd >= 0 and path.startswith(f"{self._parent}/"):
            start, elements = self._parent_fd, path[len(self._parent) + 1 :].split("/")
        else:
            start, elements = self._fd, path.split("/")
        current = start
        for element in elements:
            try:
                following = os.open(element, _STEP, dir_fd=current)
            finally:
                if current != start:
                    os.close(current)
            current = following
        self.forget()
        self._parent, self._parent_fd = path, current
        return current

    def forget(self) -> None:
        """Look the next path up from the root, for directories may have been moved meanwhile."""
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1


def open_beside(directory_fd: int, name: str) -> int:
    """Return a read-only descriptor of a file in an open directory; the caller closes it.

    Raises:
        OSError: as `os.open`; ELOOP for a symbolic link.
    """
    return os.open(name, _FILE, dir_fd=directory_fd)
