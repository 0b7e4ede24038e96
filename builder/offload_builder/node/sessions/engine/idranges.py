"""Users of this machine that engines have: a range for each, which no other engine has.

Several nodes can run on one machine, so a range is the lock of a file that all of them know. The
kernel opens the lock when its holder ends, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from offload_core.errors import QuotaExceededError

FOLDER = Path("/run/offload/session-ids")
COUNT = 65_536
_MOST = 4096


class IdRange:
    """A range of users and groups, until it is closed.

    Attributes:
        base: the first of them.
    """

    def __init__(self, base: int, path: Path, descriptor: int) -> None:
        self.base = base
        self._path = path
        self._descriptor = descriptor

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def take_range(first: int, folder: Path = FOLDER) -> IdRange:
    """Return a range that nobody has.

    Raises:
        QuotaExceededError: all are taken.
        OSError: the directory cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(_MOST):
        path = folder / str(first + number * COUNT)
        if (descriptor := _lock(path, os.O_CREAT)) >= 0:
            return IdRange(first + number * COUNT, path, descriptor)
    raise QuotaExceededError("this machine has no users left for another engine")


def remove_unused(folder: Path = FOLDER) -> None:
    """Remove the files of ranges whose holders were killed."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if (descriptor := _lock(path, 0)) >= 0:
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _lock(path: Path, flags: int) -> int:
    """Return a descriptor of a file that we have locked; -1 when somebody else has."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except OSError:
        if flags:
            raise
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have removed it in between.
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return -1
