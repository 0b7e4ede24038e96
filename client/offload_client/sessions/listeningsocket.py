"""Unix sockets at which a helper listens, for their owner alone."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BACKLOG = 128


class ListeningSocket:
    """A socket with its file, which takes the place of one that is left over.

    Attributes:
        socket: listens, and does not block.
    """

    def __init__(self, path: Path) -> None:
        """Listen.

        Args:
            path: of the file; its directory belongs to the user alone.

        Raises:
            OSError: it cannot be made.
        """
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        scratch = path.with_suffix(".new")
        try:
            self.socket.setblocking(False)
            scratch.unlink(missing_ok=True)
            self.socket.bind(str(scratch))
            scratch.chmod(0o600)
            self._file = _identity(scratch)
            self.socket.listen(BACKLOG)
            scratch.replace(path)
        except BaseException:
            self.socket.close()
            raise

    @property
    def in_place(self) -> bool:
        """Whether whoever connects comes here, and not to somebody who listens there by now."""
        try:
            return _identity(self._path) == self._file
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file; that of somebody else stays."""
        with contextlib.suppress(OSError):
            if self.in_place:
                self._path.unlink()

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
