"""Reads and changes a directory without ever leaving it, and without losing what others write.

Paths are opened name by name, and no name may be a symbolic link (`offload_core.rootdir`): the
other side, and containers, plant links wherever they can. What replaces a file is written beside
it and takes its place at once, so that nobody reads half of it. What was there is looked at after
it has left its place: when somebody has written it in the last moment, it is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from offload_core.errors import NotFoundError
from offload_core.rootdir import RootDirectory
from offload_core.treesync.entries import parent_of
from offload_core.treesync.rules import TEMPORARY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

_NOTHING_THERE = (FileNotFoundError, NotADirectoryError)
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_LEFT_SECONDS = 3600.0
_MAX_NAME_BYTES = 255
_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = getattr(_libc, "renameat2", None)


class MeanwhileError(Exception):
    """Somebody else has changed the path."""


class Stamp(NamedTuple):
    """Tells one state of a file from another."""

    device: int
    inode: int
    size_bytes: int
    modified_at_ns: int
    changed_at_ns: int

    def moved(self, other: Stamp) -> bool:
        """Return whether it is the same file, which may have been given another name."""
        return self[:4] == other[:4]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a status."""
    return Stamp(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


class Tree:
    """One directory; for one thread at a time; closed by its owner.

    Paths are relative and clean. Methods raise `OSError` for what the system refuses.
    """

    def __init__(self, root: Path, *, owner: tuple[int, int] | None = None) -> None:
        """Open a directory.

        Args:
            root: of the tree.
            owner: user and group of what is made; None for those of this process.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = os.path.realpath(root)
        self._root = RootDirectory(root)
        self._owner = owner
        status = self._root.status()
        self._identity = status.st_dev, status.st_ino

    def close(self) -> None:
        """Close it; harmless when done twice."""
        self._root.close()

    def check(self) -> None:
        """Look whether the directory is still where it was; forget what is known of others.

        Raises:
            NotFoundError: it is not.
        """
        self._root.forget()
        try:
            status = os.stat(self.path)  # noqa: PTH116 - hot
            there = (status.st_dev, status.st_ino) == self._identity
        except OSError:
            there = False
        if not there:
            raise NotFoundError(f"the directory {self.path} was moved or deleted")

    # Reading.

    def status(self, path: str) -> os.stat_result | None:
        """Return the status of a path, which is not followed; None where nothing is."""
        if not path:
            return self._root.status()
        try:
            return self._at(
                path,
                lambda fd, name: os.stat(name, dir_fd=fd, follow_symlinks=False),
            )
        except _NOTHING_THERE:
            return None

    def entries(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Return the names in a directory with their status; not those that go meanwhile."""
        found: list[tuple[str, os.stat_result]] = []
        fd = self._root.open_directory(path)
        try:
            with os.scandir(fd) as items:
                for item in items:
                    with contextlib.suppress(FileNotFoundError):
                        found.append((item.name, item.stat(follow_symlinks=False)))
        finally:
            os.close(fd)
        return found

    def open_file(self, path: str) -> int:
        """Return a descriptor to read from; the caller closes it."""
        return self._root.open_file(path)

    def read_link(self, path: str) -> bytes:
        """Return where a symbolic link leads to."""
        return os.fsencode(self._at(path, lambda fd, name: os.readlink(name, dir_fd=fd)))

    def absolute(self, path: str) -> str:
        """Return the path as the system knows it; it is not protected against links."""
        return self._root.absolute(path)

    # Changing.

    def new_file(self, path: str) -> tuple[int, str]:
        """Make an empty file beside a path, which nobody else may read yet.

        Returns:
            A descriptor to write and read, and the path for `place` or `discard`.
        """
        temporary = _beside(path)
        fd = self._changing(temporary, lambda at, name: os.open(name, _NEW_FILE, 0o600, dir_fd=at))
        return fd, temporary

    def complete(self, fd: int, mode: int, modified_at_ns: int) -> None:
        """Give a new file its owner, permissions and time."""
        if self._owner is not None:
            os.fchown(fd, *self._owner)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(time.time_ns(), modified_at_ns))

    def new_link(self, path: str, target: bytes) -> str:
        """Make a symbolic link beside a path; return its path for `place`."""
        temporary = _beside(path)

        def make(fd: int, name: str) -> None:
            os.symlink(os.fsdecode(target), name, dir_fd=fd)
            if self._owner is not None:
                os.chown(name, *self._owner, dir_fd=fd, follow_symlinks=False)

        self._changing(temporary, make)
        return temporary

    def new_directory(self, path: str, mode: int) -> str:
        """Make a directory beside a path; return its path for `place`."""
        temporary = _beside(path)

        def make(fd: int, name: str) -> None:
            os.mkdir(name, 0o700, dir_fd=fd)
            self._set(fd, name, mode, None)

        self._changing(temporary, make)
        return temporary

    def set_status(self, path: str, mode: int, modified_at_ns: int | None) -> None:
        """Change the permissions of a file or directory, and the time of a file."""
        self._at(path, lambda fd, name: self._set(fd, name, mode, modified_at_ns))

    def place(self, temporary: str, path: str, before: Stamp | None) -> str:
        """Let something new take the place of a path.

        Args:
            temporary: from `new_file`, `new_link` or `new_directory`; gone afterwards.
            path: in the same directory.
            before: what is there; None for nothing.

        Returns:
            Where the former content was kept, because somebody had just written it; else "".

        Raises:
            MeanwhileError: something is there that was not, or a directory that is not empty.
        """
        if before is None:
            self._no_replace(temporary, path)
            return ""
        name = path.rpartition("/")[2]
        new = temporary.rpartition("/")[2]
        if not self._changing(path, lambda fd, _: _exchange(fd, new, name)):
            self._same_still(path, before)
            self._changing(path, lambda fd, _: os.replace(new, name, src_dir_fd=fd, dst_dir_fd=fd))
            return ""
        return self._drop(temporary, path, before, swapped=True)

    def remove(self, path: str, before: Stamp) -> str:
        """Remove a file or link.

        Returns:
            Where it was kept, because somebody had just written it; else "".

        Raises:
            MeanwhileError: it is not there.
        """
        temporary = _beside(path)
        try:
            self._no_replace(path, temporary)
        except FileNotFoundError as error:
            raise MeanwhileError from error
        return self._drop(temporary, path, before, swapped=False)

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory.

        Raises:
            MeanwhileError: something is in it, or it is no directory any more.
        """
        try:
            self._changing(path, lambda fd, name: os.rmdir(name, dir_fd=fd))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
                raise MeanwhileError from error
            raise

    def set_aside(self, path: str, name: str) -> str:
        """Give what a path leads to another name in the same directory; return its new path.

        Raises:
            MeanwhileError: it is gone, or something has that name.
        """
        folder = parent_of(path)
        new = f"{folder}/{name}" if folder else name
        try:
            self._no_replace(path, new)
        except FileNotFoundError as error:
            raise MeanwhileError from error
        return new

    def overwrite(self, path: str, source: int, mode: int, modified_at_ns: int) -> None:
        """Write a file in its place: one that is mounted by itself would lose its mount otherwise.

        Args:
            path: of the file, which exists.
            source: descriptor of a file with the new content.
            mode: permissions.
            modified_at_ns: its time.
        """
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = self._at(path, lambda at, name: os.open(name, flags, dir_fd=at))
        try:
            os.lseek(source, 0, os.SEEK_SET)
            size = 0
            while data := os.read(source, 1 << 20):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                size += len(data)
            os.ftruncate(fd, size)
            os.fchmod(fd, mode)
            os.utime(fd, ns=(time.time_ns(), modified_at_ns))
        finally:
            os.close(fd)

    def discard(self, temporary: str) -> None:
        """Remove something new that is not wanted any more; it may be gone already."""

        def drop(fd: int, name: str) -> None:
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=fd)

        with contextlib.suppress(OSError):
            self._at(temporary, drop)

    def discard_old(self, path: str, status: os.stat_result) -> None:
        """Remove what a crash of this program has left long ago."""
        if status.st_ctime < time.time() - _LEFT_SECONDS:
            self.discard(path)

    # Inside.

    def _at(self, path: str, action: Callable[[int, str], T]) -> T:
        parent, _, name = path.rpartition("/")
        try:
            return action(self._root.beside(parent), name)
        except OSError as error:
            if error.errno == errno.ELOOP and parent:
                raise NotADirectoryError(errno.ENOTDIR, "a link is in the way") from error
            raise

    def _changing(self, path: str, action: Callable[[int, str], T]) -> T:
        """Act in the directory of a path, also where its owner may not write it just now."""
        try:
            return self._at(path, action)
        except PermissionError:
            fd = self._root.open_directory(parent_of(path))
            try:
                mode = os.fstat(fd)
                if mode.st_uid != os.geteuid() or mode.st_mode & stat.S_IRWXU == stat.S_IRWXU:
                    raise
                os.fchmod(fd, stat.S_IMODE(mode.st_mode) | stat.S_IRWXU)
                try:
                    return self._at(path, action)
                finally:
                    os.fchmod(fd, stat.S_IMODE(mode.st_mode))
            finally:
                os.close(fd)

    def _set(self, at: int, name: str, mode: int, modified_at_ns: int | None) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=at)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                if self._owner is not None and name.startswith(TEMPORARY):
                    os.fchown(fd, *self._owner)
            elif not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is neither a file nor a directory")
            os.fchmod(fd, mode)
            if modified_at_ns is not None:
                os.utime(fd, ns=(time.time_ns(), modified_at_ns))
        finally:
            os.close(fd)

    def _no_replace(self, old: str, new: str) -> None:
        """Rename within a directory.

        Raises:
            MeanwhileError: the new name is taken.
        """
        before = old.rpartition("/")[2]
        after = new.rpartition("/")[2]

        def rename(fd: int, _: str) -> None:
            if _rename(fd, before, after, _RENAME_NOREPLACE):
                return
            if os.access(after, os.F_OK, dir_fd=fd, follow_symlinks=False):
                raise FileExistsError(errno.EEXIST, "it is there")
            os.rename(before, after, src_dir_fd=fd, dst_dir_fd=fd)

        try:
            self._changing(old, rename)
        except FileExistsError as error:
            raise MeanwhileError from error

    def _same_still(self, path: str, before: Stamp) -> None:
        status = self.status(path)
        if status is None or not stamp_of(status).moved(before):
            raise MeanwhileError

    def _drop(self, temporary: str, path: str, before: Stamp, *, swapped: bool) -> str:
        """Delete what has left its place, unless somebody has just written it."""
        status = self.status(temporary)
        if status is None:
            return ""
        if stat.S_ISDIR(status.st_mode):
            try:
                self.remove_directory(temporary)
            except MeanwhileError:
                self._back(temporary, path, swapped=swapped)
                raise
            return ""
        if stamp_of(status).moved(before):
            self._changing(temporary, lambda fd, name: os.unlink(name, dir_fd=fd))
            return ""
        kept = conflict_name(path.rpartition("/")[2])
        return self.set_aside(temporary, kept)

    def _back(self, temporary: str, path: str, *, swapped: bool) -> None:
        name, new = path.rpartition("/")[2], temporary.rpartition("/")[2]
        if swapped:
            self._changing(path, lambda fd, _: _exchange(fd, new, name))
            self.discard(temporary)
        else:
            self._no_replace(temporary, path)


def conflict_name(name: str) -> str:
    """Return a name for the version that loses a conflict."""
    ending = f".conflict-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    kept = os.fsencode(name)[: _MAX_NAME_BYTES - len(ending)]
    return os.fsdecode(kept) + ending


def _beside(path: str) -> str:
    folder = parent_of(path)
    name = TEMPORARY + secrets.token_hex(8)
    return f"{folder}/{name}" if folder else name


def _exchange(fd: int, one: str, other: str) -> bool:
    """Swap two names; False where the file system cannot."""
    return _rename(fd, one, other, _RENAME_EXCHANGE)


def _rename(fd: int, old: str, new: str, flags: int) -> bool:
    if _renameat2 is None:
        return False
    if _renameat2(fd, os.fsencode(old), fd, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), new)
