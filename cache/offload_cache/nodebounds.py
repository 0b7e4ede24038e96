"""Bounds of all projects of a node together: bytes, and how long a blob may go unused.

Each open project keeps its own bound by itself (`ProjectStore.trim`). This sees to what no project
can know alone: their sum, blobs that nobody wants any more, and projects that are not open.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from offload_cache.diskstore import BlobInfo, TrimResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_cache.diskstore import DiskStore
    from offload_cache.nodestore import NodeStore

_log = structlog.get_logger(__name__)

TURN_SECONDS = 60.0
_AGE_CHECK_SECONDS = 600.0
_TARGET = 0.9


@dataclass(frozen=True, slots=True)
class _Blob:
    project_id: str
    info: BlobInfo


class NodeBounds:
    """Removes the least recently used blobs of all projects.

    Leased blobs and those that wait for their upload are never touched, even when the node then
    keeps more than its bound.
    """

    def __init__(self, store: NodeStore, *, keep_bytes: int = 0, idle_seconds: float = 0.0) -> None:
        """Set the bounds.

        Args:
            store: the node's cache.
            keep_bytes: of the blobs of all projects together; 0 for no bound.
            idle_seconds: blobs that were not used for so long go; 0 for no bound.
        """
        self._store = store
        self._keep_bytes = keep_bytes
        self._idle_seconds = idle_seconds
        self._closed_bytes: dict[str, int] = {}
        self._ages_checked_at = 0.0

    async def run(self) -> None:
        """Enforce the bounds once a minute until cancelled; failures are logged."""
        while True:
            try:
                await self.enforce()
            except Exception as error:  # noqa: BLE001 - tried again at the next turn
                _log.error("node.bounds.failed", exc_info=error)
            await asyncio.sleep(TURN_SECONDS)

    async def used_bytes(self, project_id: str) -> int:
        """Return the bytes of a project's blobs on this disk."""
        cache = self._store.opened().get(project_id)
        if cache is not None:
            self._closed_bytes.pop(project_id, None)
            return cache.store.disk.used_bytes
        if project_id not in self._closed_bytes:
            async with self._store.hold(project_id) as disk:
                blobs = await self._store.in_thread(partial(_list, disk))
            self._closed_bytes[project_id] = sum(blob.size_bytes for blob in blobs)
        return self._closed_bytes[project_id]

    async def enforce(self) -> TrimResult:
        """Bring the node within its bounds; return what went and what is left."""
        projects = self._store.on_disk()
        used = {project_id: await self.used_bytes(project_id) for project_id in projects}
        total = sum(used.values())
        ages_due = (
            self._idle_seconds > 0 and time.monotonic() - self._ages_checked_at > _AGE_CHECK_SECONDS
        )
        over = {
            project_id
            for project_id, size_bytes in used.items()
            if project_id not in self._store.opened()
            and (bound := self._store.max_bytes(project_id)) is not None
            and size_bytes > bound
        }
        over_all = 0 < self._keep_bytes < total
        if not (ages_due or over_all or over):
            return TrimResult(0, 0, total)
        blobs = await self._list(projects if ages_due or over_all else sorted(over))
        victims: dict[str, list[BlobInfo]] = defaultdict(list)
        if ages_due:
            self._ages_checked_at = time.monotonic()
            limit = time.time() - self._idle_seconds
            blobs = _take(blobs, (b for b in blobs if b.info.used_at < limit), used, victims)
        for project_id in over:
            bound = int((self._store.max_bytes(project_id) or 0) * _TARGET)
            mine = [blob for blob in blobs if blob.project_id == project_id]
            blobs = _take(blobs, _above(mine, used[project_id] - bound), used, victims)
        if over_all:
            excess = sum(used.values()) - int(self._keep_bytes * _TARGET)
            blobs = _take(blobs, _above(blobs, excess), used, victims)
        return await self._remove(victims, total)

    async def _list(self, projects: Iterable[str]) -> list[_Blob]:
        """Return blobs that may go, the longest unused first."""
        found: list[_Blob] = []
        for project_id in projects:
            kept: set[str] = set()
            if self._store.uploads is not None:
                kept = await self._store.uploads.pending_digests(project_id)
            async with self._store.hold(project_id) as disk:
                infos = await self._store.in_thread(partial(_list, disk))
                found += [
                    _Blob(project_id, info)
                    for info in infos
                    if info.digest not in kept and not disk.is_leased(info.digest)
                ]
        return sorted(found, key=lambda blob: blob.info.used_at)

    async def _remove(self, victims: Mapping[str, list[BlobInfo]], total: int) -> TrimResult:
        removed_blobs = removed_bytes = 0
        for project_id, infos in victims.items():
            async with self._store.hold(project_id) as disk:
                freed = await self._store.in_thread(partial(_delete, disk, infos))
                self._closed_bytes.pop(project_id, None)
            removed_blobs += sum(size > 0 for size in freed)
            removed_bytes += sum(freed)
        _log.info(
            "node.blobs.trimmed",
            removed_blobs=removed_blobs,
            removed_bytes=removed_bytes,
            used_bytes=total - removed_bytes,
            projects=len(victims),
        )
        return TrimResult(removed_blobs, removed_bytes, total - removed_bytes)


def _above(blobs: Iterable[_Blob], excess_bytes: int) -> list[_Blob]:
    """Return the first blobs that together have at least so many bytes."""
    chosen: list[_Blob] = []
    for blob in blobs:
        if excess_bytes <= 0:
            break
        chosen.append(blob)
        excess_bytes -= blob.info.size_bytes
    return chosen


def _take(
    blobs: list[_Blob],
    chosen: Iterable[_Blob],
    used: dict[str, int],
    victims: dict[str, list[BlobInfo]],
) -> list[_Blob]:
    """Note blobs as victims; return those that are left, in their order."""
    gone = set()
    for blob in chosen:
        gone.add((blob.project_id, blob.info.digest))
        victims[blob.project_id].append(blob.info)
        used[blob.project_id] -= blob.info.size_bytes
    return [blob for blob in blobs if (blob.project_id, blob.info.digest) not in gone]


def _list(disk: DiskStore) -> list[BlobInfo]:
    return list(disk.blobs())


def _delete(disk: DiskStore, infos: Iterable[BlobInfo]) -> list[int]:
    return [disk.delete_unused(info.digest, info.used_at) for info in infos]
