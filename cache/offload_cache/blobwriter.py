"""Writing a blob from the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from offload_core.aio import finish

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

    from offload_cache.diskstore import Ingest

_ABORT_SECONDS = 10.0


class BlobWriter:
    """One blob being written from the event loop; an async context manager that aborts at its end.

    Hashing and writing happen in a thread, one piece ahead of the caller: `write` returns when the
    piece before was written, so at most two pieces are in memory and a slow disk slows the sender.
    """

    def __init__(
        self, ingest: Ingest, executor: ThreadPoolExecutor, on_commit: Callable[[], None]
    ) -> None:
        self._ingest = ingest
        self._executor = executor
        self._on_commit = on_commit
        self._pending: asyncio.Future[None] | None = None
        self.size_bytes = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.abort()

    async def write(self, data: bytes | bytearray) -> None:
        """Append a piece; pieces of 256 KiB to 1 MiB are best. The caller must not change it.

        Raises:
            NotFoundError: the writer was aborted.
            QuotaExceededError: the disk is full.
        """
        await self.flush()
        self.size_bytes += len(data)
        loop = asyncio.get_running_loop()
        self._pending = loop.run_in_executor(self._executor, self._ingest.write, data)

    async def write_at(self, offset: int, data: bytes | bytearray) -> None:
        """Write a piece at an offset, in any order and from several tasks; not with `write`.

        Raises:
            NotFoundError: the writer was aborted.
            QuotaExceededError: the disk is full.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._ingest.write_at, offset, data)

    async def flush(self) -> None:
        """Wait until all pieces are written.

        Raises:
            NotFoundError: the writer was aborted.
            QuotaExceededError: the disk is full.
        """
        if (pending := self._pending) is not None:
            try:
                # A cancelled caller must not cancel the write: its bytes are counted already.
                await asyncio.shield(pending)
            finally:
                if pending.done():
                    self._pending = None

    async def settle(self) -> None:
        """Wait until nothing is being written, even while being cancelled; raises no error of it.

        Afterwards `size_bytes` is what the blob has, and another task may go on with it.
        """
        if self._pending is not None and not self._pending.done():
            await finish(asyncio.wait([self._pending]), _ABORT_SECONDS)

    async def commit(self, digest: str | None = None, size_bytes: int | None = None) -> str:
        """Verify and make the blob visible; return its digest.

        Raises:
            DigestMismatchError: size or digest differ; nothing is kept.
            NotFoundError: the writer was aborted.
            QuotaExceededError: the disk is full.
        """
        await self.flush()
        loop = asyncio.get_running_loop()
        blob = await loop.run_in_executor(self._executor, self._ingest.commit, digest, size_bytes)
        self._on_commit()
        return blob.digest

    async def abort(self) -> None:
        """Forget what was written; does nothing after a commit."""
        try:
            await self.settle()
        finally:
            pending, self._pending = self._pending, None
            if pending is not None and pending.done() and not pending.cancelled():
                pending.exception()  # seen: the abort makes it moot
            self._ingest.abort()
