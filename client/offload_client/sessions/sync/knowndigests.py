"""The digests that builds remember, for synchronised directories."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_client.context.hashing import read_xattrs
from offload_client.context.indexrows import FileTable, IndexedFile
from offload_client.context.statindex import GRANULARITY_NS, StatIndex
from offload_core.chunklist import is_chunked

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path


class IndexedDigests:
    """Uses the client's index of one root; for one thread at a time; closed by its owner."""

    def __init__(self, path: Path, root: Path) -> None:
        self._index = StatIndex(path, root)
        self._root = root

    def close(self) -> None:
        """Save and close."""
        self._index.close()

    def find(
        self, directory_path: str, names: Sequence[str], statuses: Sequence[os.stat_result]
    ) -> Sequence[bytes | None]:
        """Return the digests of files in a directory, names sorted; None where not known."""
        digests = self._index.directory(directory_path).digests(list(names), statuses)
        self._index.keep_chunk_lists(
            digest
            for digest, status in zip(digests, statuses, strict=True)
            if digest is not None and is_chunked(status.st_size)
        )
        return digests

    def remember(
        self, directory_path: str, files: Sequence[tuple[str, os.stat_result, bytes]]
    ) -> None:
        """Keep all digests of a directory for later runs, of builds as well."""
        table = FileTable()
        trusted_before = time.time_ns() - GRANULARITY_NS
        for name, status, sha256 in files:
            if max(status.st_mtime_ns, status.st_ctime_ns) >= trusted_before:
                continue
            path = self._root / directory_path / name
            try:
                # Builds take them from here.
                xattrs = read_xattrs(str(path))
            except OSError:
                continue
            table.add(
                name,
                IndexedFile(
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    status.st_ino,
                    sha256,
                    xattrs or None,
                ),
            )
        if table:
            self._index.remember(directory_path, table)

    def chunk_list(self, sha256: bytes) -> bytes | None:
        """Return a chunk list by its digest."""
        return self._index.chunk_list(sha256)

    def remember_chunk_list(self, sha256: bytes, data: bytes) -> None:
        """Keep a chunk list."""
        self._index.remember_chunk_list(sha256, data)

    def save(self) -> None:
        """Write what is to be kept."""
        self._index.save()
