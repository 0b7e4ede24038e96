"""Makes one pack of many small ones.

A build that changes one file leaves a pack of a few kilobytes. Hundreds of them would make a node
that has none of the content send hundreds of requests, so they are merged from time to time. The
old indexes are deleted, the old packs are left to the sweep: nodes that still know them can read
them for a day.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from typing import TYPE_CHECKING

import structlog

from offload_cache.keys import pack_key
from offload_cache.packs.layout import (
    MAX_INDEX_BYTES,
    MAX_PACK_BLOBS,
    PACK_BYTES,
    DamagedPackError,
    PackIndex,
    decode_index,
    unpack_frame,
)
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from offload_cache.objectstore import ObjectStore
    from offload_cache.packs.catalog import PackCatalog
    from offload_cache.packs.writer import PackDraft, PackWriter

_log = structlog.get_logger(__name__)

SMALL_BYTES = 2 << 20
MANY = 32
_READ_SECONDS = 30.0


class PackMerger:
    """Merges one project's small packs."""

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        catalog: PackCatalog,
        writer: PackWriter,
        *,
        thread: Executor,
        threads: Executor,
    ) -> None:
        self._objects = objects
        self._project_id = project_id
        self._catalog = catalog
        self._writer = writer
        self._thread = thread
        self._threads = threads

    async def merge(self) -> int:
        """Merge small packs when there are many.

        Two nodes that do so at once leave their content twice, which the bound takes care of; that
        the number to begin at is drawn by lot makes it rare.

        Returns:
            How many packs were merged.

        Raises:
            CacheUnavailableError: the shared store does not answer.
            OSError: this node's disk does not take the pack.
        """
        loop = asyncio.get_running_loop()
        small = await loop.run_in_executor(self._threads, self._catalog.small_packs, SMALL_BYTES)
        if len(small) < MANY + random.randrange(MANY // 2):  # noqa: S311
            return 0
        started = time.monotonic()
        before = await loop.run_in_executor(self._threads, self._catalog.next_frame)
        merged: list[str] = []
        async with self._writer.draft() as draft:
            for name in small:
                if await self._append(draft, name):
                    merged.append(name)
                if draft.full or len(draft.index.sizes_bytes) >= MAX_PACK_BLOBS // 2:
                    break
            await self._writer.publish(draft, replace_before=before)
        for name in merged:
            # Counts as a use: the old pack is left for readers that still know it.
            await self._objects.write_bytes(pack_key(self._project_id, "used", name), b"")
            await self._objects.delete(pack_key(self._project_id, "index", name))
        await loop.run_in_executor(self._threads, self._catalog.forget, merged)
        _log.info(
            "context.packs.merged",
            project_id=self._project_id,
            packs=len(merged),
            stored_bytes=draft.index.stored_bytes,
            seconds=round(time.monotonic() - started, 3),
        )
        return len(merged)

    async def _append(self, draft: PackDraft, name: str) -> bool:
        loop = asyncio.get_running_loop()
        try:
            stored = await self._objects.read_bytes(
                pack_key(self._project_id, "packs", name),
                max_bytes=PACK_BYTES,
                timeout=_READ_SECONDS,
            )
            data = await self._objects.read_bytes(
                pack_key(self._project_id, "index", name),
                max_bytes=MAX_INDEX_BYTES,
                timeout=_READ_SECONDS,
            )
            return await loop.run_in_executor(self._thread, _append_verified, draft, stored, data)
        except NotFoundError:
            await loop.run_in_executor(self._threads, self._catalog.forget, [name])
        except DamagedPackError as error:
            _log.warning("context.pack.damaged", pack=name, cause=str(error))
            await loop.run_in_executor(self._threads, self._catalog.reject, name)
        return False


def _append_verified(draft: PackDraft, stored: bytes, data: bytes) -> bool:
    """Append a pack to a draft when it is whole and fits; one bad blob would spoil all others."""
    index = decode_index(data)
    if len(draft.index.sizes_bytes) + len(index.sizes_bytes) > MAX_PACK_BLOBS:
        return False
    verify_pack(stored, index)
    draft.append(stored, index)
    return True


def verify_pack(stored: bytes, index: PackIndex) -> None:
    """Check every blob of a pack.

    Raises:
        DamagedPackError: one is not what its digest says.
    """
    if len(stored) != index.stored_bytes:
        raise DamagedPackError("the pack has another size than its index says")
    view = memoryview(stored)
    plain = memoryview(b"")
    current = -1
    offsets = index.offsets()
    for digest, number, position, size in index.blobs():
        if number != current:
            frame = index.frames[number]
            end = offsets[number] + frame.stored_bytes
            plain = unpack_frame(view[offsets[number] : end], frame.size_bytes, raw=frame.raw)
            current = number
        if hashlib.sha256(plain[position : position + size]).digest() != digest:
            raise DamagedPackError("a blob is not what its digest says")
