"""Blobs over HTTP: pull, and delete from a repository.

Source: OCI distribution specification 1.1, "Pulling blobs", "Deleting Blobs".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.registry.grants import CACHE, IMAGE
from offload_cache.registry.responses import (
    accepted,
    digest_of,
    matches_etag,
    not_deleted,
    not_modified,
    unknown_blob,
)
from offload_cache.registry.sending import send_blob
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from offload_cache.registry.grants import Registry


class BlobHandlers:
    """The endpoint `/v2/<capability>/<repository>/blobs/<digest>`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        blob = f"{base}/blobs/{{digest}}"
        return [web.get(blob, self.pull, allow_head=True), web.delete(blob, self.delete)]

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of a blob. HEAD asks the shared store; only GET fetches from it."""
        state, repository = self._registry.requested(request)
        store = state.grant.cache.store
        digest = digest_of(request.match_info["digest"])
        if repository == IMAGE and digest in state.image.removed:
            raise unknown_blob()
        if request.method == "HEAD" or matches_etag(request, digest):
            size_bytes = await store.stat_blob(digest)
            if size_bytes is None:
                raise unknown_blob()
            if matches_etag(request, digest):
                return not_modified(digest)
            return web.Response(
                headers={
                    "Content-Length": str(size_bytes),
                    "Content-Type": "application/octet-stream",
                    "Docker-Content-Digest": digest,
                    "ETag": f'"{digest}"',
                    "Accept-Ranges": "bytes",
                }
            )
        with store.lease([digest]):
            try:
                path = await store.open_blob(digest)
                state.lease(digest)
                return await send_blob(request, path, digest, store.statistics)
            except (NotFoundError, FileNotFoundError) as error:
                store.statistics.blob_misses += 1
                raise unknown_blob() from error

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """DELETE of a blob: this repository no longer has it. The project shares its bytes."""
        state, repository = self._registry.requested(request)
        if repository == CACHE:
            raise not_deleted("GET,HEAD")
        digest = digest_of(request.match_info["digest"])
        present = await state.grant.cache.store.stat_blob(digest) is not None
        if not present or digest in state.image.removed:
            raise unknown_blob()
        state.image.remove(digest)
        return accepted()
