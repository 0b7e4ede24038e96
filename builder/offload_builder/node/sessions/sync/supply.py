"""Content between a client and the copy of its directory, and the project's store in between.

What builds of the project have sent does not travel again, and what sessions send is there for
builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_builder.node.contextstore import ANY_SIZE
from offload_core.errors import OffloadError
from offload_core.sparselog import SparseLog
from offload_core.treesync.content import MESSAGE_BYTES, unpack
from offload_proto.v1.session_sync_service_pb2 import SyncContent, SyncWant

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from offload_builder.node.contextstore import ContextStore
    from offload_proto.v1.session_sync_service_pb2 import SyncPart

log = SparseLog(structlog.get_logger(__name__))


class Supply:
    """Content of one project."""

    def __init__(self, store: ContextStore | None) -> None:
        """Prepare.

        Args:
            store: of the project; None for no store.
        """
        self._store = store

    async def missing(self, want: SyncWant) -> tuple[SyncWant | None, list[SyncPart]]:
        """Return what only the client has, and what is here."""
        store = self._store
        if store is None:
            return want, []
        digests = [part.sha256 for part in want.parts]
        sizes = [part.size_bytes or ANY_SIZE for part in want.parts]
        try:
            missing = set(await store.run(store.missing_sync, digests, sizes))
        except OffloadError as error:
            log.warning("sync.store.unreadable", cause=error.message)
            return want, []
        here = [part for part in want.parts if part.sha256 not in missing]
        if not here:
            return want, []
        rest = [part for part in want.parts if part.sha256 in missing]
        return (SyncWant(parts=rest) if rest else None), here

    async def found(self, parts: Sequence[SyncPart]) -> AsyncGenerator[SyncContent | SyncWant]:
        """Yield the content of parts that are here, and those that turn out to be damaged."""
        store = self._store
        if store is None:
            return
        store.lease([part.sha256 for part in parts])
        try:
            content = SyncContent()
            pieces: list[bytes] = []
            total = 0
            for part in parts:
                data = await self._read(store, part)
                if data is None:
                    yield SyncWant(parts=[part])
                    continue
                if pieces and total + len(data) > MESSAGE_BYTES:
                    content.data = b"".join(pieces)
                    yield content
                    content, pieces, total = SyncContent(), [], 0
                content.sha256.append(part.sha256)
                content.sizes_bytes.append(len(data))
                pieces.append(data)
                total += len(data)
            if pieces:
                content.data = b"".join(pieces)
                yield content
        finally:
            store.release([part.sha256 for part in parts])

    async def keep(self, content: SyncContent) -> None:
        """Store what the client has sent; never fails, for the session has it anyway."""
        store = self._store
        if store is None:
            return
        try:
            found = await store.run_reading(unpack, content)
            blobs = [(digest, data) for digest, data in found if data]
            await store.run(store.put_many_sync, blobs)
            if store.trim_due:
                await store.trim()
        except OffloadError as error:
            log.warning("sync.content.not_stored", cause=error.message)

    @staticmethod
    async def _read(store: ContextStore, part: SyncPart) -> bytes | None:
        size = part.size_bytes or ANY_SIZE
        try:
            return await store.run_reading(_read_verified, store, part.sha256, size)
        except OffloadError:
            return None


def _read_verified(store: ContextStore, sha256: bytes, size: int) -> bytes | None:
    return store.read_sync(sha256, size, verify=True)
