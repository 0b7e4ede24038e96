"""Fills the current directory from a tree, piece by piece, in any order of the pieces.

Everything is made in a hidden directory and comes to its place at the end, by renaming: what is
given up half-way is never seen. Runs in the worker's process, with the mount as its root directory.
"""

# Many small files: plain system calls, no path objects.
# ruff: noqa: PTH101, PTH102, PTH104, PTH208, PTH211
from __future__ import annotations

import contextlib
import os
import shutil
import stat

from offload_builder.node.mounts.packing import RESTORE_PREFIX, Index, signature_of
from offload_builder.node.mounts.tree import (
    PIECE_BYTES,
    Entry,
    Kind,
    Tree,
    decompress,
    digest_of,
)

_BLOCK_BYTES = 64 << 10
_ZEROS = bytes(_BLOCK_BYTES)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Unpacker:
    """Restores one tree.

    Args:
        tree: what to restore.
        name: tells the hidden directory from others.

    Raises:
        OSError: a directory cannot be made.
    """

    def __init__(self, tree: Tree, name: str) -> None:
        self._tree = tree
        self._folder = RESTORE_PREFIX + name
        self._by_piece: dict[int, list[Entry]] = {}
        self._begun: set[str] = set()
        os.umask(0)
        os.mkdir(self._folder, 0o700)
        for entry in tree.entries:
            if entry.kind is Kind.DIRECTORY and entry.path:
                # What may be entered and written is set at the end.
                os.mkdir(self._at(entry.path), 0o700)
            elif entry.kind is Kind.FILE:
                for number in dict.fromkeys(entry.extents[::3]):
                    self._by_piece.setdefault(number, []).append(entry)

    def _at(self, path: str) -> str:
        return f"{self._folder}/{path}"

    def add(self, number: int, blob: bytes) -> None:
        """Write what lies in a piece.

        Raises:
            ValueError: the blob is not that piece.
            OSError: a file cannot be written.
        """
        piece = self._tree.pieces[number]
        if digest_of(blob) != piece.digest:
            raise ValueError(f"a piece of a cache mount is damaged: {piece.digest}")
        data = memoryview(decompress(blob, PIECE_BYTES))
        if len(data) != piece.content_bytes:
            raise ValueError(f"a piece of a cache mount has another size: {piece.digest}")
        for entry in self._by_piece.pop(number, ()):
            self._write(entry, number, data)

    def _write(self, entry: Entry, number: int, data: memoryview) -> None:
        if len(entry.extents) == 3:
            _, offset, length = entry.extents
            self._create(entry, data[offset : offset + length])
            return
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        if entry.path not in self._begun:
            self._begun.add(entry.path)
            flags = _NEW
        descriptor = os.open(self._at(entry.path), flags, 0o600)
        try:
            position = 0
            numbers = iter(entry.extents)
            for one, offset, length in zip(numbers, numbers, numbers, strict=True):
                if one == number:
                    _write_sparse(descriptor, data[offset : offset + length], position)
                position += length
        finally:
            os.close(descriptor)

    def _create(self, entry: Entry, content: memoryview) -> None:
        descriptor = os.open(self._at(entry.path), _NEW, entry.mode & 0o777)
        try:
            _write_all(descriptor, content, 0)
            _dress(descriptor, entry)
        finally:
            os.close(descriptor)

    def complete(self) -> None:
        """Make what is no content of a piece; then everything lies in the hidden directory.

        Raises:
            ValueError: pieces are missing.
            OSError: something cannot be made.
        """
        if self._by_piece:
            raise ValueError(f"{len(self._by_piece)} pieces of a cache mount are missing")
        for entry in self._tree.entries:
            self._complete(entry)
        for entry in reversed(self._directories()):
            if entry.path:
                self._dress_directory(self._at(entry.path), entry)

    def place(self) -> None:
        """Bring everything to its place; quick, and not to be given up half-way.

        Raises:
            OSError: something is in the way.
        """
        for name in sorted(os.listdir(self._folder)):
            # What a step has made meanwhile stays.
            if not os.path.lexists(name):
                os.rename(self._at(name), name)
        shutil.rmtree(self._folder)
        for entry in self._directories():
            if not entry.path:
                self._dress_directory(".", entry)

    def _directories(self) -> list[Entry]:
        return [entry for entry in self._tree.entries if entry.kind is Kind.DIRECTORY]

    def _complete(self, entry: Entry) -> None:
        path = self._at(entry.path)
        if entry.kind is Kind.FILE and not entry.extents:
            self._create(entry, memoryview(b""))
        elif entry.kind is Kind.FILE and len(entry.extents) > 3:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, entry.size_bytes())
                os.fchmod(descriptor, entry.mode)
                _dress(descriptor, entry)
            finally:
                os.close(descriptor)
        elif entry.kind is Kind.SYMLINK:
            os.symlink(entry.target, path)
            os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        elif entry.kind is Kind.FIFO:
            os.mkfifo(path, entry.mode)
            os.chown(path, entry.uid, entry.gid)
            os.chmod(path, entry.mode)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
        elif entry.kind is Kind.HARD_LINK:
            os.link(self._at(entry.target), path, follow_symlinks=False)

    @staticmethod
    def _dress_directory(path: str, entry: Entry) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _dress(descriptor, entry)
            os.fchmod(descriptor, entry.mode)
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)

    def index(self) -> Index:
        """Return what is to be known of the files at their places."""
        index = Index(pieces=self._tree.pieces)
        for entry in self._tree.entries:
            if entry.kind is Kind.FILE:
                found = os.lstat(entry.path)
                if stat.S_ISREG(found.st_mode) and found.st_size == entry.size_bytes():
                    index.files[entry.path] = (signature_of(found), entry.extents)
        return index


def _dress(descriptor: int, entry: Entry) -> None:
    """Set owner, mode, attributes and time; in this order, as each undoes a part of the next."""
    if entry.uid or entry.gid:
        os.fchown(descriptor, entry.uid, entry.gid)
    if entry.uid or entry.gid or entry.mode & 0o7000:
        os.fchmod(descriptor, entry.mode)
    for name, value in entry.xattrs.items():
        os.setxattr(descriptor, name, value)
    os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))


def _write_sparse(descriptor: int, data: memoryview, position: int) -> None:
    """Write what is not zero; the file gets its size later."""
    for start in range(0, len(data), _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        if block.tobytes() != _ZEROS[: len(block)]:
            _write_all(descriptor, block, position + start)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        position += written
        data = data[written:]


def clear_leftovers() -> None:
    """Remove what restores that were given up have left."""
    with os.scandir(".") as listed:
        names = [item.name for item in listed if item.name.startswith(RESTORE_PREFIX)]
    for name in names:
        with contextlib.suppress(OSError):
            shutil.rmtree(name)
