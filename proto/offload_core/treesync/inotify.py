"""Linux's inotify, for trees whose links must not be followed.

Libraries that watch whole trees follow links: with watchfiles, one to /usr in a tree of ten files
takes 17,000 watches, and a container can plant it. They also cannot leave out what is ignored.
Here a directory is watched when it is listed, so nothing between the two is missed, and what has
been written can be asked for: the kernel queues an event before the write returns.
Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from typing import NamedTuple

_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16
_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED = 0x40 | 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000
_IN_DONT_FOLLOW = 0x02000000
_IN_EXCL_UNLINK = 0x04000000
_MASK = (
    _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED | _IN_CREATE | _IN_DELETE
    | _IN_ONLYDIR | _IN_DONT_FOLLOW | _IN_EXCL_UNLINK
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Noticed(NamedTuple):
    """What has happened.

    Attributes:
        paths: that are to be looked at.
        lost: events were lost, so that everything is to be looked at.
    """

    paths: set[str]
    lost: bool


class Inotify:
    """Watches directories; for one thread at a time; closed by its owner.

    Attributes:
        descriptor: readable when something has happened.
        complete: every directory that was asked for is watched.
    """

    def __init__(self) -> None:
        """Open it.

        Raises:
            OSError: there is none on this system, or no more for this user.
        """
        if sys.platform != "linux":
            raise OSError("there is no inotify on this system")
        self.descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.complete = True
        self._paths: dict[int, str] = {}
        self._watches: dict[str, int] = {}

    def close(self) -> None:
        """End all watches; harmless when done twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def watch(self, path: str, absolute: str) -> None:
        """Watch the names in a directory.

        Args:
            path: relative, "" for the root.
            absolute: the same, for the system.
        """
        if path in self._watches:
            return
        watch = _libc.inotify_add_watch(self.descriptor, os.fsencode(absolute), _MASK)
        if watch < 0:
            # Gone by now is no loss. Anything else is: a limit of the system, or of permissions.
            if ctypes.get_errno() not in (2, 20, 40):
                self.complete = False
            return
        former = self._paths.get(watch)
        if former is not None:
            self._watches.pop(former, None)
        self._paths[watch] = path
        self._watches[path] = watch

    def forget(self, path: str) -> None:
        """Stop watching a directory that is gone."""
        watch = self._watches.pop(path, None)
        if watch is not None and self._paths.get(watch) == path:
            del self._paths[watch]
            _libc.inotify_rm_watch(self.descriptor, watch)

    def read(self) -> Noticed:
        """Return everything that has happened up to now; does not wait."""
        paths: set[str] = set()
        lost = False
        while True:
            try:
                data = os.read(self.descriptor, _READ_BYTES)
            except BlockingIOError:
                return Noticed(paths, lost)
            at = 0
            while at < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                name = data[at : at + length].rstrip(b"\0")
                at += length
                if mask & _IN_Q_OVERFLOW:
                    lost = True
                    continue
                folder = self._paths.get(watch)
                if folder is None:
                    continue
                if mask & _IN_IGNORED:
                    del self._paths[watch]
                    if self._watches.get(folder) == watch:
                        del self._watches[folder]
                    continue
                text = os.fsdecode(name)
                paths.add(f"{folder}/{text}" if folder and text else folder or text)
