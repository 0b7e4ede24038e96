"""Packs the current directory: what changed since the last time becomes new pieces.

Runs in the worker's process, with the mount as its root directory.
"""

# Many small files: plain system calls, no path objects.
# ruff: noqa: PTH115
from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.node.mounts.tree import (
    MAX_ENTRIES,
    PIECE_BYTES,
    Entry,
    Kind,
    Piece,
    Tree,
    compress,
    decompress,
    digest_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

RESTORE_PREFIX = ".offload-restore-"
"""Names at the top of a mount that a restore makes; never part of the content."""
_MAX_INDEX_BYTES = 512 << 20
_SKIPPED_XATTRS = ("trusted.", "system.", "security.selinux", "security.ima", "security.evm")
_ACCESS_LISTS = ("system.posix_acl_access", "system.posix_acl_default")

Signature = tuple[int, int, int, int]
"""Size, mtime, ctime (both ns) and inode: a file with the same one has the same content."""


class TooLargeError(Exception):
    """The mount holds more than it may."""


class ChangedError(Exception):
    """A file changed while it was read."""


@dataclass(slots=True)
class Index:
    """What this node knows of the files that it packed or restored last, and their pieces."""

    pieces: list[Piece] = field(default_factory=list)
    files: dict[str, tuple[Signature, list[int]]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the bytes to keep on disk."""
        document = {
            "pieces": [[p.digest, p.size_bytes, p.content_bytes] for p in self.pieces],
            "files": self.files,
        }
        return compress(json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode())

    @classmethod
    def decode(cls, data: bytes) -> Index:
        """Read them; whatever is no index is an empty one."""
        try:
            document = json.loads(decompress(data, _MAX_INDEX_BYTES))
            return cls(
                [Piece(*row) for row in document["pieces"]],
                {
                    path: ((sig[0], sig[1], sig[2], sig[3]), extents)
                    for path, (sig, extents) in document["files"].items()
                },
            )
        except (ValueError, KeyError, TypeError, IndexError):
            return cls()


def signature_of(found: os.stat_result) -> Signature:
    """Return what tells whether a file has changed."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class Packer:
    """Packs one directory.

    Args:
        index: of the last time, its pieces being stored still.
        max_bytes: bound of the content.
        emit: takes each new piece: digest and blob.
    """

    def __init__(self, index: Index, max_bytes: int, emit: Callable[[str, bytes], None]) -> None:
        self.tree = Tree()
        self.index = Index()
        self.content_bytes = 0
        self._old = index
        self._max_bytes = max_bytes
        self._emit = emit
        self._links: dict[tuple[int, int], str] = {}
        self._fresh: list[tuple[Entry, Signature]] = []
        self._kept: list[tuple[Entry, Signature, list[int]]] = []
        self._buffer = bytearray()
        self._placed: dict[str, int] = {}

    def run(self) -> None:
        """Do it; the results are `tree` and `index`.

        Raises:
            TooLargeError: the directory holds more than it may.
            ChangedError: a file changed meanwhile.
            OSError: something cannot be read.
        """
        self._walk()
        self._keep_pieces()
        for entry, signature in self._fresh:
            self._read(entry, signature)
            self.index.files[entry.path] = (signature, entry.extents)
        self._flush()
        self.index.pieces = self.tree.pieces

    # What is there.

    def _walk(self) -> None:
        self._note("", os.lstat("."), ".")
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            with os.scandir(folder or ".") as listed:
                items = sorted(listed, key=lambda item: os.fsencode(item.name))
            below: list[str] = []
            for item in items:
                if not folder and item.name.startswith(RESTORE_PREFIX):
                    continue
                path = f"{folder}/{item.name}" if folder else item.name
                found = item.stat(follow_symlinks=False)
                self._note(path, found, path)
                if stat.S_ISDIR(found.st_mode):
                    below.append(path)
            waiting.extend(reversed(below))
            if len(self.tree.entries) > MAX_ENTRIES:
                raise TooLargeError(f"it has more than {MAX_ENTRIES} files")

    def _note(self, path: str, found: os.stat_result, real: str) -> None:
        mode = found.st_mode
        entry = Entry(
            Kind.FILE, path, stat.S_IMODE(mode), found.st_uid, found.st_gid, found.st_mtime_ns
        )
        if stat.S_ISDIR(mode):
            entry.kind = Kind.DIRECTORY
        elif stat.S_ISLNK(mode):
            entry.kind, entry.target = Kind.SYMLINK, os.readlink(real)
        elif stat.S_ISFIFO(mode):
            entry.kind = Kind.FIFO
        elif stat.S_ISREG(mode):
            self._note_file(entry, found)
        else:
            return  # sockets belong to a process that is gone, devices to the machine
        if entry.kind in (Kind.FILE, Kind.DIRECTORY):
            entry.xattrs = _xattrs(real)
        self.tree.entries.append(entry)

    def _note_file(self, entry: Entry, found: os.stat_result) -> None:
        if found.st_nlink > 1:
            first = self._links.setdefault((found.st_dev, found.st_ino), entry.path)
            if first != entry.path:
                entry.kind, entry.target = Kind.HARD_LINK, first
                return
        self.content_bytes += found.st_size
        if self.content_bytes > self._max_bytes:
            raise TooLargeError(f"it holds more than {self._max_bytes} bytes")
        signature = signature_of(found)
        known = self._old.files.get(entry.path)
        if known is not None and known[0] == signature:
            self._kept.append((entry, signature, known[1]))
        else:
            self._fresh.append((entry, signature))

    # What of it is stored already.

    def _keep_pieces(self) -> None:
        live = [0] * len(self._old.pieces)
        for _, _, extents in self._kept:
            for number, length in zip(extents[::3], extents[2::3], strict=True):
                live[number] += length
        worth = [
            2 * used >= piece.content_bytes and used > 0
            for used, piece in zip(live, self._old.pieces, strict=True)
        ]
        numbers: dict[int, int] = {}
        for old, piece in enumerate(self._old.pieces):
            if worth[old]:
                numbers[old] = self._place(piece)
        for entry, signature, extents in self._kept:
            if all(number in numbers for number in extents[::3]):
                entry.extents = list(extents)
                entry.extents[::3] = [numbers[number] for number in extents[::3]]
                self.index.files[entry.path] = (signature, entry.extents)
            else:
                self._fresh.append((entry, signature))
        self._fresh.sort(key=lambda item: os.fsencode(item[0].path))

    def _place(self, piece: Piece) -> int:
        number = self._placed.setdefault(piece.digest, len(self.tree.pieces))
        if number == len(self.tree.pieces):
            self.tree.pieces.append(piece)
        return number

    # What is new.

    def _read(self, entry: Entry, signature: Signature) -> None:
        size = signature[0]
        if size == 0:
            return
        descriptor = _open(entry.path)
        try:
            self._check_unchanged(descriptor, entry, signature)
            if size > PIECE_BYTES:
                # Segments of its own: those of a large file that stay the same are stored once.
                for offset in range(0, size, PIECE_BYTES):
                    data = self._read_exactly(
                        descriptor, min(PIECE_BYTES, size - offset), entry.path
                    )
                    entry.extents += [self._write(data), 0, len(data)]
                self._check_unchanged(descriptor, entry, signature)
                return
            if len(self._buffer) + size > PIECE_BYTES:
                self._flush()
            # The number that the piece gets when it is flushed.
            entry.extents = [len(self.tree.pieces), len(self._buffer), size]
            self._buffer += self._read_exactly(descriptor, size, entry.path)
            self._check_unchanged(descriptor, entry, signature)
        finally:
            os.close(descriptor)

    @staticmethod
    def _check_unchanged(descriptor: int, entry: Entry, signature: Signature) -> None:
        if signature_of(os.fstat(descriptor)) != signature:
            raise ChangedError(entry.path)

    @staticmethod
    def _read_exactly(descriptor: int, size: int, path: str) -> bytes:
        data = os.read(descriptor, size)
        while len(data) < size:
            more = os.read(descriptor, size - len(data))
            if not more:
                raise ChangedError(path)
            data += more
        return data

    def _write(self, data: bytes | bytearray) -> int:
        self._flush()
        blob = compress(data)
        digest = digest_of(blob)
        known = self._placed.get(digest)
        if known is not None:
            return known
        self._emit(digest, blob)
        return self._place(Piece(digest, len(blob), len(data)))

    def _flush(self) -> None:
        if self._buffer:
            data, self._buffer = self._buffer, bytearray()
            blob = compress(data)
            digest = digest_of(blob)
            self._emit(digest, blob)
            # Never merged with an equal one: its number is in its entries already.
            self._placed.setdefault(digest, len(self.tree.pieces))
            self.tree.pieces.append(Piece(digest, len(blob), len(data)))


def _open(path: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with contextlib.suppress(PermissionError):
        return os.open(path, flags | os.O_NOATIME)
    return os.open(path, flags)


def _xattrs(path: str) -> dict[str, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in names
            if name in _ACCESS_LISTS or not name.startswith(_SKIPPED_XATTRS)
        }
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return {}
        raise
