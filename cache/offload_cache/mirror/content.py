"""Manifests and blobs of base images: from the project's store, else from upstream into it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_cache.manifests import MAX_MANIFEST_BYTES, parse_manifest
from offload_cache.mirror.errors import UnfitError
from offload_cache.mirror.flights import Flights
from offload_cache.mirror.transfer import BlobPull
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_cache.manifests import Manifest
    from offload_cache.mirror.upstream import EndpointClient, Upstream
    from offload_cache.tiered import ProjectStore
    from offload_core.aio import TaskSet

_log = structlog.get_logger(__name__)
_PARALLEL_BLOBS = 6
MAX_BLOB_BYTES = 32 << 30


@dataclass(frozen=True, slots=True)
class BaseManifest:
    """A verified manifest or index."""

    body: bytes
    digest: str
    media_type: str


class BaseContent:
    """Reads content by digest, and pulls each digest once however many ask for it.

    Whether the pool may have it is decided before (`images.BaseImages`).

    Args:
        store: of the project.
        tasks: for pulls; its owner ends them.
    """

    def __init__(self, store: ProjectStore, tasks: TaskSet) -> None:
        self._store = store
        self._manifests: Flights[str, BaseManifest] = Flights(tasks, "pull base manifest")
        self._blobs: Flights[str, Path] = Flights(tasks, "pull base blob")
        self._slots = asyncio.Semaphore(_PARALLEL_BLOBS)

    async def manifest(self, upstream: Upstream, repository: str, digest: str) -> BaseManifest:
        """Return a manifest by its digest.

        Raises:
            UpstreamError: it cannot be had, or is of a kind that is not served.
            QuotaExceededError: the disk is full.
        """
        return await self._manifests.join(
            digest, lambda: self._get_manifest(upstream, repository, digest)
        )

    async def _get_manifest(self, upstream: Upstream, repository: str, digest: str) -> BaseManifest:
        try:
            body = await self._store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
        except NotFoundError:
            body = await upstream.read_manifest(repository, digest)
            if sha256_digest(body) != digest:
                raise UnfitError(f"manifest {digest} is damaged upstream") from None
            manifest = _parsed(body)
            await self._store.put_blob(body, digest)
            self._count(len(body))
        else:
            manifest = _parsed(body)
        return BaseManifest(body, digest, manifest.media_type)

    async def parsed(self, digest: str) -> tuple[Manifest, int]:
        """Return a manifest that this node or the shared store has, and its bytes.

        Raises:
            NotFoundError: neither has it.
            UnfitError: it is no manifest.
        """
        body = await self._store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
        return _parsed(body), len(body)

    async def blob(self, upstream: Upstream, repository: str, digest: str) -> Path:
        """Return the path of a verified blob.

        Raises:
            UpstreamError: it cannot be had.
            NotFoundError: it was trimmed at once, because the disk is too small.
            QuotaExceededError: the disk is full.
        """
        return await self._blobs.join(digest, lambda: self._get_blob(upstream, repository, digest))

    async def _get_blob(self, upstream: Upstream, repository: str, digest: str) -> Path:
        try:
            return await self._store.open_blob(digest)
        except NotFoundError:
            pass

        async def pull(client: EndpointClient) -> int:
            async with self._store.ingest() as writer:
                return await BlobPull(client, repository, digest, writer, MAX_BLOB_BYTES).run()

        async with self._slots:
            started = time.monotonic()
            size_bytes = await upstream.first(pull)
        self._count(size_bytes)
        _log.info(
            "base_images.blob.pulled",
            project_id=self._store.project_id,
            repository=f"{upstream.host}/{repository}",
            digest=digest,
            size_bytes=size_bytes,
            seconds=round(time.monotonic() - started, 3),
        )
        return await self._store.open_blob(digest)

    def _count(self, size_bytes: int) -> None:
        self._store.statistics.base_pulls += 1
        self._store.statistics.base_bytes_pulled += size_bytes


def _parsed(body: bytes) -> Manifest:
    try:
        return parse_manifest(body)
    except UsageError as error:
        raise UnfitError(f"a manifest cannot be served: {error.message}") from error
