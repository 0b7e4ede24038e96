"""Puts blobs of this node's disk into packs and packs into the shared store."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Self

import structlog

from offload_cache.keys import pack_key
from offload_cache.packs.layout import (
    FRAME_BYTES,
    MAX_BLOB_BYTES,
    MAX_PACK_BLOBS,
    PACK_BYTES,
    Frame,
    PackIndex,
    encode_index,
    frame_compressor,
    new_pack_name,
    pack_frame,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from offload_cache.objectstore import ObjectStore
    from offload_cache.packs.catalog import PackCatalog
    from offload_cache.packs.pending import PendingBlobs

_log = structlog.get_logger(__name__)

_TAKEN_AT_ONCE = 1024
DRAFT_SUFFIX = ".pack"


class PackDraft:
    """A pack that is being made, in a file of its own; a context manager that removes the file.

    Every method blocks; one thread at a time may use it.
    """

    def __init__(self, folder: Path) -> None:
        self.name = ""
        self.path = folder / f"{secrets.token_hex(8)}{DRAFT_SUFFIX}"
        self.index = PackIndex()
        self._file = self.path.open("wb")
        self._compressor = frame_compressor()
        self._digests: list[bytes] = []
        self._seen: set[bytes] = set()
        self._stored_bytes = 0
        self._open: list[bytes] = []
        self._open_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def full(self) -> bool:
        """Whether the pack has what a pack should have."""
        return (
            self._stored_bytes + self._open_bytes >= PACK_BYTES or len(self._seen) >= MAX_PACK_BLOBS
        )

    def add(
        self, digests: Sequence[bytes], start: int, read: Callable[[bytes], bytes | None]
    ) -> int:
        """Add blobs until a frame is complete; return the number of the next one to add.

        A blob that is gone, or is not what its digest says, is left out.

        Raises:
            OSError: the disk does not take the pack.
        """
        for number in range(start, len(digests)):
            digest = digests[number]
            if digest in self._seen:
                continue
            content = read(digest)
            if not content or len(content) > MAX_BLOB_BYTES:
                continue
            if hashlib.sha256(content).digest() != digest:
                _log.warning("context.blob.damaged", sha256=digest.hex())
                continue
            if self._open and self._open_bytes + len(content) > FRAME_BYTES + FRAME_BYTES // 4:
                # A large blob gets a frame of its own; small ones do not wait behind it.
                self._close_frame()
            self._seen.add(digest)
            self._digests.append(digest)
            self.index.sizes_bytes.append(len(content))
            self._open.append(content)
            self._open_bytes += len(content)
            if self._open_bytes >= FRAME_BYTES or self.full:
                self._close_frame()
                return number + 1
        return len(digests)

    def _close_frame(self) -> None:
        stored, raw = pack_frame(b"".join(self._open), self._compressor)
        self._file.write(stored)
        self.index.frames.append(Frame(len(stored), self._open_bytes, len(self._open), raw))
        self._stored_bytes += len(stored)
        self._open.clear()
        self._open_bytes = 0

    def append(self, stored: bytes, index: PackIndex) -> None:
        """Add all frames of another pack as they are.

        Raises:
            OSError: the disk does not take the pack.
        """
        self._file.write(stored)
        self.index.frames += index.frames
        self.index.sizes_bytes += index.sizes_bytes
        self._digests.append(index.digests)
        self._stored_bytes += len(stored)

    def finish(self) -> bytes:
        """Complete the file, name it, and return the encoded index; b"" when it holds nothing.

        Raises:
            OSError: the disk does not take the pack.
        """
        if self._open:
            self._close_frame()
        self._file.close()
        # Now, not at the start: others look for names that are not much older than the index.
        self.name = new_pack_name()
        if not self.index.frames:
            return b""
        self.index.digests = b"".join(self._digests)
        return encode_index(self.index)


class PackWriter:
    """Makes packs of one project's blobs.

    Args:
        objects: the shared store.
        project_id: whose blobs they are.
        catalog: what is packed already; told of new packs.
        folder: for packs that are being made.
        read: returns a blob of this node's disk, None when it is gone; runs in `thread`.
        thread: runs reading and compression, a frame at a time.
        threads: answers questions to the catalogue.
        pace: awaited after each piece of work with the seconds that it took.
    """

    def __init__(
        self,
        objects: ObjectStore,
        project_id: str,
        catalog: PackCatalog,
        folder: Path,
        *,
        read: Callable[[bytes], bytes | None],
        thread: Executor,
        threads: Executor,
        pace: Callable[[float], Awaitable[None]],
    ) -> None:
        self._objects = objects
        self._project_id = project_id
        self._catalog = catalog
        self._folder = folder
        self._read = read
        self._thread = thread
        self._threads = threads
        self._pace = pace

    @contextlib.asynccontextmanager
    async def draft(self) -> AsyncIterator[PackDraft]:
        """Open a pack to be made.

        Raises:
            OSError: this node's disk does not take it.
        """
        draft = PackDraft(self._folder)
        try:
            yield draft
        finally:
            # The thread may still be at work for a caller that was cancelled: queue behind it.
            try:
                self._thread.submit(draft.__exit__)
            except RuntimeError:  # it has ended
                draft.__exit__()

    async def write_pack(self, pending: PendingBlobs) -> None:
        """Make one pack of the blobs that have waited longest, and store it.

        When that fails or is cancelled they wait again.

        Raises:
            CacheUnavailableError: the shared store did not take it.
            OSError: this node's disk did not.
        """
        taken: list[bytes] = []
        started = time.monotonic()
        try:
            async with self.draft() as draft:
                await self._fill(draft, pending, taken)
                await self.publish(draft)
        except BaseException:
            pending.give_back(taken)
            raise
        if draft.index.frames:
            _log.info(
                "context.pack.stored",
                project_id=self._project_id,
                pack=draft.name,
                blobs=len(draft.index.sizes_bytes),
                size_bytes=sum(draft.index.sizes_bytes),
                stored_bytes=draft.index.stored_bytes,
                seconds=round(time.monotonic() - started, 3),
            )

    async def _fill(self, draft: PackDraft, pending: PendingBlobs, taken: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        while not draft.full and (part := pending.take(_TAKEN_AT_ONCE)):
            taken += part
            packed = await loop.run_in_executor(self._threads, self._catalog.present, part)
            new = [digest for digest in part if digest not in packed]
            at = 0
            while at < len(new) and not draft.full:
                started = time.monotonic()
                at = await loop.run_in_executor(self._thread, draft.add, new, at, self._read)
                await self._pace(time.monotonic() - started)
            if at < len(new):
                del taken[len(taken) - len(part) :]
                taken += new[:at]
                pending.give_back(new[at:])

    async def publish(self, draft: PackDraft, *, replace_before: int | None = None) -> None:
        """Store a draft: first the pack, then the index, which makes it visible.

        Raises:
            CacheUnavailableError: the shared store did not take it.
            OSError: this node's disk did not.
        """
        loop = asyncio.get_running_loop()
        index = await loop.run_in_executor(self._thread, draft.finish)
        if not index:
            return
        await self._objects.write_file(pack_key(self._project_id, "packs", draft.name), draft.path)
        await self._objects.write_bytes(pack_key(self._project_id, "index", draft.name), index)
        await loop.run_in_executor(
            self._threads, self._add, draft.name, draft.index, replace_before
        )

    def _add(self, name: str, index: PackIndex, replace_before: int | None) -> None:
        self._catalog.add(name, index, replace_before=replace_before)
