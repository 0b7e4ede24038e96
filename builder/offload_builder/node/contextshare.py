"""Content of build contexts that any node of the pool has seen, for all its nodes.

Nodes keep it in the pool's shared store, by project, as packs (`offload_cache.packs`). A node packs
what clients have sent to it in the background, once the project is quiet, and looks there for what
it lacks before it asks a client. The shared store is never needed: whatever is wrong with it is a
miss.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.sharingwork import SharingWork
from offload_cache.packs.catalog import PackCatalog
from offload_cache.packs.reader import PackReader
from offload_cache.packs.refresh import CatalogRefresh

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Sequence
    from pathlib import Path
    from types import TracebackType

    from offload_cache.objectstore import ObjectStore

log = structlog.get_logger(__name__)

FIND_SECONDS = 1.5
"""Longest that a build waits for news of the shared store."""


class SharingThreads:
    """The threads of all projects of a node, started as they are needed; to be closed.

    Attributes:
        work: one, which reads and packs: a second would take a build's core.
        answers: for what builds wait for.
    """

    def __init__(self) -> None:
        self.work = ThreadPoolExecutor(1, thread_name_prefix="context-pack")
        self.answers = ThreadPoolExecutor(3, thread_name_prefix="context-share")

    def close(self) -> None:
        """End them; waits for what they do."""
        self.work.shutdown(wait=True)
        self.answers.shutdown(wait=True)


class SharedContext:
    """One project's part of what the pool has; an async context manager. Nothing here raises.

    Args:
        project_id: whose content it is; nobody else's is ever visible.
        objects: the pool's shared store; its owner closes it.
        folder: for the catalogue and for packs that are being made; created when missing.
        idle_seconds: how long a pack stays in the shared store that no node stored or read.
        threads: of the node.
        read: returns a blob of this node's disk, None when it is gone; runs in a thread.
        busy: whether builds run on this node, which the work in the background must not disturb.
    """

    def __init__(
        self,
        project_id: str,
        objects: ObjectStore,
        folder: Path,
        *,
        idle_seconds: float,
        threads: SharingThreads,
        read: Callable[[bytes], bytes | None],
        busy: Callable[[], bool],
    ) -> None:
        self._project_id = project_id
        self._objects = objects
        self._answers = threads.answers
        self._catalog = PackCatalog(folder / "catalog.db")
        self._refresh = CatalogRefresh(objects, project_id, self._catalog, threads.answers)
        self._work = SharingWork(
            project_id, objects, self._catalog, self._refresh, folder,
            idle_seconds=idle_seconds,
            thread=threads.work, answers=threads.answers, read=read, busy=busy,
        )  # fmt: skip
        self._reader = PackReader(
            objects, project_id, self._catalog, threads.answers, on_read=self._work.note_use
        )

    async def __aenter__(self) -> Self:
        """Open the catalogue and begin the work in the background."""
        await asyncio.get_running_loop().run_in_executor(self._answers, self._catalog.open)
        await self._work.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Share what can be shared in a few seconds, note the rest for the next start."""
        await self._work.close()
        await self._refresh.close()
        await asyncio.get_running_loop().run_in_executor(self._answers, self._catalog.close)

    @property
    def available(self) -> bool:
        """Whether the shared store is worth a question now."""
        return self._objects.reachable and not self._reader.shy

    async def settle(self) -> None:
        """Share for some seconds what waits, as the first step of closing; then nothing is added.

        Several projects of a node settle at the same time and close one after the other.
        """
        await self._work.settle()

    async def wait_shared(self, seconds: float) -> bool:
        """Wait until all that was added here can be found by other nodes.

        Returns:
            False when it is not so within `seconds`, or because the shared store fails.
        """
        return await self._work.wait_shared(seconds)

    async def find(self, digests: Collection[bytes]) -> set[bytes]:
        """Return those that the shared store has, as far as is known within `FIND_SECONDS`.

        What other nodes have stored meanwhile is asked for when a digest is not known, at most
        every two seconds.
        """
        if not digests or not self.available:
            return set()
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._answers, self._catalog.present, digests)
        if len(found) < len(digests):
            if not await self._refresh.refresh(FIND_SECONDS):
                return set()
            missing = [digest for digest in digests if digest not in found]
            found |= await loop.run_in_executor(self._answers, self._catalog.present, missing)
        return found

    async def fetch(self, digests: Collection[bytes]) -> AsyncGenerator[list[tuple[bytes, bytes]]]:
        """Yield the content of blobs in groups of about 1 MiB, in any order, verified.

        What does not come is a miss: it is not there, damaged, or the shared store is too slow.
        Close the generator when leaving early (`contextlib.aclosing`).
        """
        if not digests or not self.available:
            return
        places = await asyncio.get_running_loop().run_in_executor(
            self._answers, self._catalog.locate, digests
        )
        if not places:
            return
        started = time.monotonic()
        blobs = size_bytes = 0
        async with aclosing(self._reader.read(places)) as groups:
            async for group in groups:
                blobs += len(group)
                size_bytes += sum(len(content) for _, content in group)
                if group:
                    yield group
        log.info(
            "context.fetch.completed",
            project_id=self._project_id,
            blobs=blobs,
            missed=len(digests) - blobs,
            size_bytes=size_bytes,
            seconds=round(time.monotonic() - started, 3),
        )

    def added(self, digests: Sequence[bytes]) -> None:
        """Note blobs that are stored on this node now; they are shared once it is quiet."""
        self._work.added(digests)
