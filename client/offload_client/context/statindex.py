"""Remembers the digests of files, so that an unchanged tree is not read again.

One SQLite file serves all contexts of a user. A row holds one directory of one root: its files
with size, mtime, ctime, inode and digest, packed, because 50,000 rows cost more time than the
files that they describe. The chunk lists of large files are kept by their digest.

A digest is remembered only when mtime and ctime were older than the reading of the file by more
than `GRANULARITY_NS`: a file that is written twice within one tick of the clock looks the same
after both writes (the "racy" problem of git's index). It is used only when size, mtime, ctime and
inode are as they were. The ctime cannot be set by programs, so a restored mtime hides nothing.

The index only saves time. When it is locked, damaged or cannot be written, it is empty.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zlib
from typing import TYPE_CHECKING, Self

from offload_client.context.indexfile import IndexFile
from offload_client.context.indexrows import KnownFiles

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from offload_client.context.indexrows import FileTable
    from offload_client.invocation import Invocation

GRANULARITY_NS = 2_000_000_000
"""Coarsest time stamps in use are FAT's 2 s; it also covers a file server's clock that differs."""
KEEP_DAYS = 30
"""What no scan has asked for so long is forgotten."""
CHUNK_LISTS_BYTES = 64 << 20
"""All of them; for some 500 GB of files. The longest unused are forgotten first."""
_TOUCH_DAYS = 7
_DAY_SECONDS = 86_400


def index_path(invocation: Invocation) -> Path | None:
    """Return where the digests of former scans are kept; None to keep none.

    A pipeline with OFFLOAD_TOKEN starts from a fresh checkout on a machine that is thrown away, so
    nothing is written there, unless XDG_CACHE_HOME names a place that lives on.
    """
    environment = invocation.environment
    if environment.get("OFFLOAD_TOKEN") and not environment.get("XDG_CACHE_HOME"):
        return None
    return invocation.cache_dir() / "statindex.db"


class StatIndex:
    """The part of the index that belongs to one root; for one thread at a time.

    Nothing is opened before it is asked. Several processes may use the file at once; the last to
    save a directory wins, which costs at most a repeated reading.
    """

    def __init__(self, path: Path, root: Path) -> None:
        """Prepare an index.

        Args:
            path: the SQLite file, made with its directories when missing.
            root: root of the build context.
        """
        self._file = IndexFile(path)
        self._root = hashlib.sha256(os.fsencode(os.path.realpath(root))).digest()[:16]
        self._packed: dict[bytes, tuple[int, int, bytes]] | None = None
        self._used: set[bytes] = set()
        self._changed: dict[bytes, bytes] = {}
        self._used_lists: set[bytes] = set()
        self._new_lists: dict[bytes, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def problem(self) -> str:
        """Why the index is out of use; empty while it works."""
        return self._file.problem

    def close(self) -> None:
        """Save and close; harmless when done twice."""
        self.save()
        self._file.close()
        self._packed = None

    def directory(self, path: str) -> KnownFiles:
        """Return what is known about the files of a directory, "" for the root."""
        if self._packed is None:
            self._packed = self._load()
        key = os.fsencode(path)
        row = self._packed.get(key)
        if row is None:
            return KnownFiles()
        self._used.add(key)
        _, checksum, data = row
        try:
            if zlib.crc32(data) == checksum:
                return KnownFiles(data)
        except (struct.error, ValueError, IndexError):
            pass
        return KnownFiles()

    def remember(self, path: str, files: FileTable) -> None:
        """Replace what is known about a directory; written by `save`."""
        self._changed[os.fsencode(path)] = files.pack()

    def chunk_list(self, sha256: bytes) -> bytes | None:
        """Return a chunk list that was remembered, or None."""
        data = self._new_lists.get(sha256)
        if data is None and self._file.exists():
            for (found,) in self._file.rows(
                "SELECT data FROM chunk_lists WHERE sha256 = ?", (sha256,)
            ):
                data = found
        if data is None or hashlib.sha256(data).digest() != sha256:
            return None
        return data

    def remember_chunk_list(self, sha256: bytes, data: bytes) -> None:
        """Keep a chunk list; written by `save`."""
        self._new_lists[sha256] = data

    def keep_chunk_lists(self, digests: Iterable[bytes]) -> None:
        """Say that chunk lists are still of use."""
        self._used_lists.update(digests)

    def save(self) -> None:
        """Write what was remembered since the last time."""
        if self._packed is None or not self._file.opened:
            return
        today = _today()
        changed, self._changed = self._changed, {}
        new_lists, self._new_lists = self._new_lists, {}
        old = today - _TOUCH_DAYS
        touched = [
            (today, self._root, key)
            for key in self._used - changed.keys()
            if self._packed[key][0] < old
        ]
        used_lists = [(today, sha256, old) for sha256 in self._used_lists - new_lists.keys()]
        self._used.clear()
        self._used_lists.clear()
        rows = [(self._root, key, today, zlib.crc32(data), data) for key, data in changed.items()]
        lists = [(sha256, today, data) for sha256, data in new_lists.items()]
        if not (rows or touched or lists or used_lists):
            return
        saved = self._file.write(
            (
                ("INSERT OR REPLACE INTO directories VALUES (?, ?, ?, ?, ?)", rows),
                ("UPDATE directories SET used_on = ? WHERE root = ? AND path = ?", touched),
                ("INSERT OR REPLACE INTO chunk_lists VALUES (?, ?, ?)", lists),
                (
                    "UPDATE chunk_lists SET used_on = ? WHERE sha256 = ? AND used_on < ?",
                    used_lists,
                ),
                ("DELETE FROM directories WHERE used_on < ?", [(today - KEEP_DAYS,)]),
                ("DELETE FROM chunk_lists WHERE used_on < ?", [(today - KEEP_DAYS,)]),
                (_FORGET_LISTS, [(CHUNK_LISTS_BYTES,)] if lists else []),
            )
        )
        if saved:
            self._packed.update({row[1]: (row[2], row[3], row[4]) for row in rows})

    def _load(self) -> dict[bytes, tuple[int, int, bytes]]:
        rows = self._file.rows(
            "SELECT path, used_on, checksum, data FROM directories WHERE root = ?", (self._root,)
        )
        return {path: (used_on, checksum, data) for path, used_on, checksum, data in rows}


_FORGET_LISTS = """
DELETE FROM chunk_lists WHERE rowid IN (
  SELECT number FROM (
    SELECT rowid AS number, sum(length(data)) OVER (ORDER BY used_on DESC, rowid DESC) AS total
    FROM chunk_lists
  ) WHERE total > ?
)
"""


def _today() -> int:
    return int(time.time()) // _DAY_SECONDS
