"""The content of a cache mount: a list of its files, and pieces that hold their bytes.

A *tree* is one blob that lists everything; file contents lie in *pieces*, blobs of some MiB. A
snapshot keeps the pieces of the one before and adds pieces for what is new, so that what moves is
what changed, however the files are spread over the directory. A piece of which less than half is
of use is written again. Both are zstd; a tree is JSON inside.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum

import zstandard

PIECE_BYTES = 8 << 20
"""Content of a piece; a larger file has pieces of its own."""
MAX_TREE_BYTES = 256 << 20
NAMESPACE_IDS = 65536
"""Users of one user namespace."""
MAX_ENTRIES = 1_000_000
_VERSION = 1


class Kind(StrEnum):
    """What an entry is."""

    DIRECTORY = "d"
    FILE = "f"
    SYMLINK = "l"
    HARD_LINK = "h"
    FIFO = "p"


@dataclass(slots=True)
class Entry:
    """A file, directory or link.

    Attributes:
        path: relative, without `.` and `..`; "" is the mount itself. Bytes that are no UTF-8 are
            surrogate escapes.
        mode: permission bits with setuid, setgid and sticky.
        extents: for a file, its content in order: piece, offset and length, as one flat list.
        target: of a symbolic link, or the path of the file that a hard link is.
        xattrs: extended attributes.
    """

    kind: Kind
    path: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    extents: list[int] = field(default_factory=list)
    target: str = ""
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Return the bytes of a file."""
        return sum(self.extents[2::3])


@dataclass(frozen=True, slots=True)
class Piece:
    """A blob of contents: its digest, its bytes, and the bytes of content in it."""

    digest: str
    size_bytes: int
    content_bytes: int


@dataclass(slots=True)
class Tree:
    """All of a mount; parents come before what is in them, files before hard links to them."""

    entries: list[Entry] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def encode(self) -> bytes:
        """Return the blob; the same tree gives the same bytes."""
        document = {
            "version": _VERSION,
            "pieces": [[p.digest, p.size_bytes, p.content_bytes] for p in self.pieces],
            "entries": [_row(entry) for entry in self.entries],
        }
        return compress(json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode())

    @classmethod
    def decode(cls, data: bytes) -> Tree:
        """Read a blob.

        Raises:
            ValueError: it is none, or is out of bounds.
        """
        document = json.loads(decompress(data, MAX_TREE_BYTES))
        if not isinstance(document, dict) or document.get("version") != _VERSION:
            raise ValueError("this is no tree of a cache mount")
        try:
            pieces = [Piece(str(d), int(s), int(c)) for d, s, c in document["pieces"]]
            entries = [_entry(row) for row in document["entries"]]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the tree of a cache mount is damaged: {error}") from error
        tree = cls(entries, pieces)
        tree._check()
        return tree

    def shift_owners(self, by: int) -> None:
        """Move all owners from one user namespace to another.

        Attributes of the system do not come along: capabilities belong to a namespace.

        Args:
            by: added to all numbers; those that are in no namespace then become its root.
        """
        lowest = max(by, 0)
        highest = lowest + NAMESPACE_IDS - 1
        for entry in self.entries:
            uid, gid = entry.uid + by, entry.gid + by
            entry.uid = uid if lowest <= uid <= highest else lowest
            entry.gid = gid if lowest <= gid <= highest else lowest
            entry.xattrs = {
                name: value for name, value in entry.xattrs.items() if name.startswith("user.")
            }

    def _check(self) -> None:
        if len(self.entries) > MAX_ENTRIES:
            raise ValueError("the tree of a cache mount has too many entries")
        for piece in self.pieces:
            if not 0 <= piece.content_bytes <= PIECE_BYTES:
                raise ValueError("a piece of a cache mount is too large")
        for entry in self.entries:
            check_path(entry.path)
            if entry.kind is Kind.HARD_LINK:
                check_path(entry.target)
            numbers = iter(entry.extents)
            for piece_number, offset, length in zip(numbers, numbers, numbers, strict=True):
                if not 0 <= piece_number < len(self.pieces) or offset < 0 or length < 0:
                    raise ValueError(f"the file {entry.path!r} lies in no piece")
                if offset + length > self.pieces[piece_number].content_bytes:
                    raise ValueError(f"the file {entry.path!r} is longer than its piece")


def check_path(path: str) -> str:
    """Return a path that stays inside.

    Raises:
        ValueError: it does not.
    """
    parts = path.split("/")
    if path and ("" in parts or "." in parts or ".." in parts or "\0" in path):
        raise ValueError(f"the path {path!r} leaves the cache mount")
    return path


def digest_of(data: bytes) -> str:
    """Return the digest of a blob."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compress(data: bytes | bytearray) -> bytes:
    """Return data as one zstd frame that knows its size."""
    return zstandard.ZstdCompressor(level=1, write_content_size=True).compress(data)


def decompress(data: bytes, limit: int) -> bytes:
    """Return what a frame holds.

    Raises:
        ValueError: it is damaged, or holds more than `limit` bytes.
    """
    try:
        if not 0 <= zstandard.frame_content_size(data) <= limit:
            raise ValueError("a blob of a cache mount is larger than it may be")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"a blob of a cache mount is damaged: {error}") from error


def _row(entry: Entry) -> list[object]:
    row: list[object] = [
        entry.kind.value, entry.path, entry.mode, entry.uid, entry.gid, entry.mtime_ns,
    ]  # fmt: skip
    if entry.kind is Kind.FILE:
        row.append(entry.extents)
    elif entry.target:
        row.append(entry.target)
    else:
        row.append(0)
    if entry.xattrs:
        coded = {key: base64.b64encode(value).decode() for key, value in entry.xattrs.items()}
        row.append(dict(sorted(coded.items())))
    return row


def _entry(row: list[object]) -> Entry:
    kind, path, mode, uid, gid, mtime_ns, payload = row[:7]
    numbers = (mode, uid, gid, mtime_ns)
    if not isinstance(path, str) or not all(isinstance(number, int) for number in numbers):
        raise TypeError("an entry is malformed")
    entry = Entry(Kind(str(kind)), path, *numbers)  # type: ignore[arg-type]
    if isinstance(payload, list):
        if not all(isinstance(number, int) for number in payload) or len(payload) % 3:
            raise TypeError("the extents of an entry are malformed")
        entry.extents = payload
    elif isinstance(payload, str):
        entry.target = payload
    if len(row) > 7 and isinstance(row[7], dict):
        entry.xattrs = {str(key): base64.b64decode(value) for key, value in row[7].items()}
    return entry
