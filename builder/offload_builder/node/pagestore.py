"""Pages of listings as content of the project: on this node's disk and in the shared store."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from offload_core.listing import MAX_PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.node.contextshare import SharedContext
    from offload_builder.node.contextstore import ContextStore


class PageStore:
    """The pages that one build uses; `close` gives them back to the store's collection.

    A digest is no proof of what a client has: a stored page is looked at like one that was sent.
    """

    def __init__(self, store: ContextStore, shared: SharedContext | None) -> None:
        self._store = store
        self._shared = shared
        self._leased: set[bytes] = set()

    async def find(self, digests: Sequence[bytes]) -> set[bytes]:
        """Return those that are there, fetched from the shared store if need be, and keep them.

        Raises:
            QuotaExceededError: the disk is full.
        """
        missing = await self._store.run(self._store.missing_sync, digests)
        if missing and self._shared is not None and (known := await self._shared.find(missing)):
            fetched: set[bytes] = set()
            async with aclosing(self._shared.fetch(known)) as groups:
                async for group in groups:
                    await self._store.run(self._put_sync, group)
                    fetched.update(digest for digest, _ in group)
            missing = [digest for digest in missing if digest not in fetched]
        found = set(digests).difference(missing)
        self._lease(found)
        return found

    async def load(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return pages by digest, as many as are not too much for once.

        One that has gone, is damaged or too large for a page is left out.
        """
        return await self._store.run_reading(self._read_sync, digests)

    async def keep(self, pages: Sequence[tuple[bytes, bytes]]) -> None:
        """Store pages whose digests were verified.

        Raises:
            QuotaExceededError: the disk is full.
        """
        await self._store.run(self._put_sync, pages)
        digests = [digest for digest, _ in pages]
        self._lease(digests)
        if self._shared is not None:
            self._shared.added(digests)

    def close(self) -> None:
        """End the leases; safe to call again."""
        self._store.release(self._leased)
        self._leased.clear()

    def _lease(self, digests: Sequence[bytes] | set[bytes]) -> None:
        new = set(digests) - self._leased
        self._store.lease(new)
        self._leased |= new

    def _put_sync(self, pages: Sequence[tuple[bytes, bytes]]) -> None:
        self._store.put_many_sync(pages)

    def _read_sync(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        size = 0
        for digest in digests:
            data = self._store.read_sync(digest, verify=True)
            if data is not None and len(data) <= MAX_PAGE_BYTES:
                found[digest] = data
                size += len(data)
                if size >= MAX_PAGE_BYTES:
                    break
        return found
