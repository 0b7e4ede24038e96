"""BuildKit's local sources, served from the client's entries and the node's context store.

The Dockerfile and the ignore files come with the start of the build, so the first two of
BuildKit's three local requests cost no round trip to the client.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING

from offload_builder.node.entries import check_path
from offload_core.filemode import is_regular
from offload_proto.v1.node_service_pb2 import ContextEntry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from offload_builder.buildkit.providers import LocalTree
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.stickytimes import StickyTimes
    from offload_proto.v1.builds_service_pb2 import BuildStats
    from offload_proto.v1.node_service_pb2 import InlineFile

SMALL_BYTES = 256 << 10
CHUNK_BYTES = 1 << 20
ENTRIES_PER_BATCH = 2000
EMPTY_SHA256 = hashlib.sha256(b"").digest()
IGNORE_SUFFIX = ".dockerignore"


class InlineTree:
    """Small files that came with the start of the build."""

    def __init__(self, files: Sequence[InlineFile]) -> None:
        self._files = sorted(files, key=lambda file: file.path.encode())
        self.entries: list[ContextEntry] = [
            ContextEntry(
                path=file.path,
                mode=file.mode,
                size_bytes=len(file.data),
                sha256=hashlib.sha256(file.data).digest(),
                # The Dockerfile is always requested (BuildKit's differ is off for it), so the
                # time is only what COPY of a Dockerfile would show.
                modified_at_unix_ns=int.from_bytes(hashlib.sha256(file.data).digest()[:4]) * 10**9
                + 1,
            )
            for file in self._files
        ]

    async def batches(self) -> AsyncIterator[Sequence[ContextEntry]]:
        """Yield the entries."""
        yield self.entries

    async def requested(self, indexes: Sequence[int]) -> None:
        """Nothing to fetch: the bytes are here."""

    async def read(self, index: int) -> AsyncIterator[bytes]:
        """Yield the bytes of file `index`."""
        yield self._files[index].data

    async def close(self) -> None:
        """Nothing to release."""


class ContextTree:
    """A directory of the client, its files in the context store or on their way there."""

    def __init__(
        self, entries: list[ContextEntry], store: ContextStore, link: ClientLink, stats: BuildStats
    ) -> None:
        self.entries = entries
        self._store = store
        self._link = link
        self._stats = stats
        self._digests = [entry.sha256 for entry in entries if entry.sha256]
        store.lease(self._digests)

    async def batches(self) -> AsyncIterator[Sequence[ContextEntry]]:
        """Yield the entries in runs, so that BuildKit starts before it has been told all."""
        for start in range(0, len(self.entries), ENTRIES_PER_BATCH):
            yield self.entries[start : start + ENTRIES_PER_BATCH]

    async def requested(self, indexes: Sequence[int]) -> None:
        """Ask the client, in one message, for the content that the node lacks."""
        sizes = {
            digest: self.entries[index].size_bytes
            for index in indexes
            if (digest := self.entries[index].sha256) and digest != EMPTY_SHA256
        }
        missing = await self._store.run(self._store.missing_sync, list(sizes))
        if missing:
            await self._link.request_blobs({digest: sizes[digest] for digest in missing})

    async def read(self, index: int) -> AsyncIterator[bytes]:
        """Yield the bytes of file `index`, waiting for them to arrive from the client."""
        entry = self.entries[index]
        if entry.sha256 in (b"", EMPTY_SHA256) or entry.size_bytes == 0:
            return
        await self._link.arrival(entry.sha256)
        file = self._store.open_sync(entry.sha256)
        try:
            if entry.size_bytes <= SMALL_BYTES:
                # From the page cache: shorter than a hand-over to a thread.
                yield os.read(file, SMALL_BYTES)
                return
            while data := await asyncio.to_thread(os.read, file, CHUNK_BYTES):
                yield data
        finally:
            os.close(file)

    async def close(self) -> None:
        """Keep everything: the same tree may be asked for again until `release`."""

    def release(self) -> None:
        """Give the leases back."""
        self._store.release(self._digests)
        self._digests = []


class ReplayedTree:
    """A directory that BuildKit reads once more."""

    def __init__(self, tree: ContextTree, on_close: Callable[[], Awaitable[None]] | None) -> None:
        self.batches = tree.batches
        self.requested = tree.requested
        self.read = tree.read
        self._on_close = on_close

    async def close(self) -> None:
        """Tell that it was read."""
        if self._on_close is not None:
            await self._on_close()


class BuildContext:
    """The local sources of one build: `dockerfile` and `context`."""

    def __init__(
        self,
        link: ClientLink,
        store: ContextStore,
        times: StickyTimes,
        inline: Sequence[InlineFile],
        shared_key: str,
        stats: BuildStats,
    ) -> None:
        """Prepare the sources.

        Raises:
            UsageError: an inline file has a path that leaves its source.
        """
        self._link = link
        self._store = store
        self._times = times
        self._inline = list(inline)
        for file in self._inline:
            check_path(file.path)
        self._shared_key = shared_key
        self._stats = stats
        self._trees: list[ContextTree] = []
        self._listed: dict[str, ContextTree] = {}
        self.on_replayed: Callable[[], Awaitable[None]] | None = None
        """Awaited when BuildKit has read a directory for the second time."""

    async def open(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> LocalTree:
        """Return the tree for one FileSync request of BuildKit."""
        if name == "dockerfile" or (follow and all(_is_ignore_file(path) for path in follow)):
            wanted = set(follow)
            files = [
                file
                for file in self._inline
                if file.local_name == name and (not wanted or file.path in wanted)
            ]
            return InlineTree(files)
        request = repr((name, list(include), list(exclude), list(follow)))
        if request in self._listed:
            # The cache export solves once more; it needs what the build saw, not what the
            # client's directory holds by now, and the client may be gone.
            return ReplayedTree(self._listed[request], self.on_replayed)
        entries = await self._link.request_context(name, include, exclude, follow)
        files_of_tree = [entry for entry in entries if is_regular(entry.mode) and entry.sha256]
        self._stats.context_files += len(files_of_tree)
        self._stats.context_bytes += sum(entry.size_bytes for entry in files_of_tree)
        await self._store.run(self._times.apply, f"{self._shared_key}/{name}", entries)
        tree = ContextTree(entries, self._store, self._link, self._stats)
        self._trees.append(tree)
        self._listed[request] = tree
        return tree

    async def close(self) -> None:
        """Release every tree; safe to call again."""
        while self._trees:
            self._trees.pop().release()


def _is_ignore_file(path: str) -> bool:
    return path == IGNORE_SUFFIX
