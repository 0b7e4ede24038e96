"""BuildKit's local sources, served from the client's listings and the node's content.

The Dockerfile and the ignore files come with the start of the build, so the first two of
BuildKit's three local requests cost no round trip to the client.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import ExitStack
from typing import TYPE_CHECKING

from offload_builder.buildkit.providers import StatRun
from offload_builder.buildkit.statframes import stat_frames
from offload_builder.node.contexttree import ContextTree
from offload_builder.node.entries import check_path
from offload_builder.node.listing import Listing
from offload_builder.node.needs import CONTEXT, ClientNeeds
from offload_builder.node.pagestore import PageStore
from offload_builder.node.telling import Telling
from offload_builder.node.toldtables import ListingKey
from offload_core.listing import Page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from offload_builder.buildkit.providers import LocalTree
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.content import BuildContent
    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.stickytimes import StickyTimes
    from offload_proto.v1.builds_service_pb2 import BuildStats
    from offload_proto.v1.node_service_pb2 import InlineFile

IGNORE_SUFFIX = ".dockerignore"
LAYOUT_PREFIX = "oci:"


class InlineTree:
    """Small files that came with the start of the build."""

    def __init__(self, files: Sequence[InlineFile]) -> None:
        self._files = sorted(files, key=lambda file: file.path.encode())

    async def runs(self) -> AsyncIterator[StatRun]:
        """Yield the entries."""
        if not self._files:
            return
        page = Page(
            [file.path for file in self._files],
            [file.mode for file in self._files],
            [len(file.data) for file in self._files],
            b"",
        )
        # The Dockerfile is always requested (BuildKit's differ is off for it), so the time is
        # only what COPY of a Dockerfile would show.
        times = [
            int.from_bytes(hashlib.sha256(file.data).digest()[:4]) * 10**9 + 1
            for file in self._files
        ]
        yield StatRun(stat_frames(page, times), len(page))

    def content_size(self, index: int) -> int:
        """Return the bytes of a file."""
        return len(self._files[index].data) if index < len(self._files) else -1

    async def requested(self, indexes: Sequence[int]) -> None:
        """Nothing to fetch: the bytes are here."""

    def at_hand(self, index: int) -> bytes:
        """Return the bytes of file `index`."""
        return self._files[index].data

    async def read(self, index: int) -> AsyncIterator[bytes]:
        """Yield the bytes of file `index`."""
        yield self._files[index].data

    async def delivered(self) -> None:
        """Nothing to remember."""

    async def close(self) -> None:
        """Nothing to release."""


class ReplayedTree(ContextTree):
    """A directory that BuildKit reads once more, with the times that it was told before."""


class BuildContext:
    """The local sources of one build; `close` at the end."""

    def __init__(
        self,
        link: ClientLink,
        content: BuildContent,
        store: ContextStore,
        times: StickyTimes,
        inline: Sequence[InlineFile],
        shared_key: str,
        stats: BuildStats,
        needs: ClientNeeds | None = None,
    ) -> None:
        """Prepare the sources.

        While one is read that was not read before, the client is among the `needs`.

        Raises:
            UsageError: an inline file has a path that leaves its source.
        """
        self._link = link
        self._content = content
        self._times = times
        self._inline = list(inline)
        for file in self._inline:
            check_path(file.path)
        self._shared_key = shared_key
        self._stats = stats
        self._needs = needs or ClientNeeds()
        self._pages = PageStore(store, content.blobs.shared)
        self._listings: dict[str, Listing] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._opening = asyncio.Lock()
        self.on_replayed: Callable[[], Awaitable[None]] | None = None
        """Awaited when BuildKit has read a directory for the second time."""

    async def open(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> LocalTree:
        """Return the tree for one FileSync request of BuildKit.

        Raises:
            OffloadError: the client is gone.
        """
        if name == "dockerfile" or (follow and all(_is_ignore_file(path) for path in follow)):
            wanted = set(follow)
            files = [
                file
                for file in self._inline
                if file.local_name == name and (not wanted or file.path in wanted)
            ]
            return InlineTree(files)
        return await self.open_tree(name, include, exclude, follow)

    async def open_tree(
        self,
        name: str,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        follow: Sequence[str] = (),
    ) -> ContextTree:
        """Return a directory of the client; the caller closes it.

        Raises:
            OffloadError: the client is gone.
        """
        request = repr((name, list(include), list(exclude), list(follow)))
        async with self._opening:
            listing = self._listings.get(request)
            # The cache export solves once more; it needs what the build saw, not what the
            # client's directory holds by now, and the client may be gone.
            replayed = listing is not None
            if listing is None:
                listing = await self._begin(name, include, exclude, follow)
                self._listings[request] = listing
        opened = listing
        need = ExitStack()
        if not replayed or not opened.complete:
            need.enter_context(self._needs.hold(CONTEXT))

        async def closed() -> None:
            need.close()
            if replayed and self.on_replayed is not None:
                await self.on_replayed()
            if not opened.users and not opened.complete:
                # What was given up half-way is asked for again.
                self._listings.pop(request, None)
                await opened.close()

        kind = ReplayedTree if replayed else ContextTree
        return kind(listing, self._content, closed)

    async def _begin(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> Listing:
        feed = await self._link.request_context(name, include, exclude, follow)
        key = ListingKey(self._shared_key, name)
        # BuildKit is told nothing of a layout: it reads single blobs of it.
        memory = None if name.startswith(LAYOUT_PREFIX) else self._times
        listing = Listing(
            feed,
            self._pages,
            self._times,
            Telling(memory, key),
            key,
            self._turns.setdefault(name, asyncio.Lock()),
            self._stats,
        )
        listing.on_refused = self._link.lose
        listing.start()
        return listing

    def told(self) -> list[tuple[str, list[bytes]]]:
        """Return what BuildKit was told of each local source: the digests of pages."""
        return [(listing.name, listing.page_digests) for listing in self._listings.values()]

    async def close(self) -> None:
        """Release everything; safe to call again."""
        while self._listings:
            _, listing = self._listings.popitem()
            await listing.close()
        self._pages.close()


def _is_ignore_file(path: str) -> bool:
    return path == IGNORE_SUFFIX
