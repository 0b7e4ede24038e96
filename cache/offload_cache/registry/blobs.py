"""Blobs over HTTP: pull, resumable push, cross-repository mount.

Source: OCI distribution specification 1.1, "Pulling blobs", "Pushing blobs".
"""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.registry.grants import CACHE, IMAGE
from offload_cache.registry.responses import BlobResponse, RegistryError, unknown_blob
from offload_core.digest import is_digest
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from offload_cache.blobwriter import BlobWriter
    from offload_cache.registry.grants import GrantState, Registry

_PIECE_BYTES = 1 << 20
_IDLE_SECONDS = 60.0
_RANGE = re.compile(r"(\d{1,16})-(\d{1,16})")


class BlobHandlers:
    """The endpoints below `/v2/<capability>/<repository>/blobs/`."""

    def __init__(self, registry: Registry, *, max_blob_bytes: int) -> None:
        self._registry = registry
        self._max_blob_bytes = max_blob_bytes

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        uploads = f"{base}/blobs/uploads/"
        upload = uploads + "{upload}"
        return [
            web.get(f"{base}/blobs/{{digest}}", self.pull, allow_head=True),
            web.post(uploads, self.start),
            web.get(upload, self.progress, allow_head=False),
            web.patch(upload, self.append),
            web.put(upload, self.complete),
            web.delete(upload, self.cancel),
        ]

    def _state(self, request: web.Request) -> tuple[GrantState, str]:
        state = self._registry.state(request.match_info["capability"])
        return state, request.match_info["repository"]

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of a blob. HEAD asks the shared store; only GET fetches from it."""
        state, _ = self._state(request)
        store = state.grant.cache.store
        digest = _digest(request.match_info["digest"])
        if request.method == "HEAD":
            size_bytes = await store.stat_blob(digest)
            if size_bytes is None:
                raise unknown_blob()
            return web.Response(
                headers={
                    "Content-Length": str(size_bytes),
                    "Content-Type": "application/octet-stream",
                    "Docker-Content-Digest": digest,
                    "Accept-Ranges": "bytes",
                }
            )
        try:
            path = await store.open_blob(digest)
        except NotFoundError as error:
            store.statistics.blob_misses += 1
            raise unknown_blob() from error
        state.lease(digest)
        return BlobResponse(path, digest, store)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """POST: mount a blob, push it in one request, or open an upload."""
        state, repository = self._state(request)
        state.check_write(repository)
        store = state.grant.cache.store
        if (mount := request.query.get("mount")) is not None:
            source = request.query.get("from", "")
            own = {f"{request.match_info['capability']}/{name}" for name in (CACHE, IMAGE)}
            if source in own and await store.stat_blob(_digest(mount)) is not None:
                store.statistics.blobs_mounted += 1
                state.lease(mount)
                return _created(request, mount)
        state.check_upload()
        writer = store.ingest()
        name = uuid.uuid4().hex
        state.writers[repository, name] = writer
        if (digest := request.query.get("digest")) is not None:
            return await self._finish(request, state, writer, name, digest)
        return self._accepted(request, name, writer, status=202)

    def _accepted(
        self, request: web.Request, name: str, writer: BlobWriter, *, status: int
    ) -> web.Response:
        info = request.match_info
        location = f"/v2/{info['capability']}/{info['repository']}/blobs/uploads/{name}"
        return web.Response(
            status=status,
            headers={
                "Location": location,
                "Docker-Upload-UUID": name,
                "Range": f"0-{max(writer.size_bytes - 1, 0)}",
            },
        )

    def _writer(self, request: web.Request) -> tuple[GrantState, str, BlobWriter]:
        state, repository = self._state(request)
        state.check_write(repository)
        name = request.match_info["upload"]
        writer = state.writers.get((repository, name))
        if writer is None:
            raise RegistryError(404, "BLOB_UPLOAD_UNKNOWN", "there is no such upload")
        return state, name, writer

    async def progress(self, request: web.Request) -> web.StreamResponse:
        """GET of an upload: how far it is."""
        _, name, writer = self._writer(request)
        return self._accepted(request, name, writer, status=204)

    async def append(self, request: web.Request) -> web.StreamResponse:
        """PATCH: the next chunk of an upload."""
        _, name, writer = self._writer(request)
        await self._receive(request, writer)
        return self._accepted(request, name, writer, status=202)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """PUT: the last chunk, if any, and the digest of the whole."""
        state, name, writer = self._writer(request)
        return await self._finish(request, state, writer, name, request.query.get("digest", ""))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """DELETE of an upload."""
        state, name, writer = self._writer(request)
        state.writers.pop((request.match_info["repository"], name), None)
        await writer.abort()
        return web.Response(status=204)

    async def _finish(
        self, request: web.Request, state: GrantState, writer: BlobWriter, name: str, digest: str
    ) -> web.Response:
        try:
            _digest(digest)
            await self._receive(request, writer)
            state.lease(digest)
            await writer.commit(digest)
        finally:
            # Whatever went wrong, the client starts this upload again from its beginning.
            state.writers.pop((request.match_info["repository"], name), None)
            await writer.abort()
        return _created(request, digest)

    async def _receive(self, request: web.Request, writer: BlobWriter) -> None:
        """Stream the request's body to the blob in pieces, at most two of them in memory."""
        self._check_position(request, writer)
        statistics = self._state(request)[0].grant.cache.store.statistics
        content = request.content
        piece = bytearray()
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                data = await content.readany()
            if data:
                piece += data
                if writer.size_bytes + len(piece) > self._max_blob_bytes:
                    raise RegistryError(
                        413, "SIZE_INVALID", f"a blob may have {self._max_blob_bytes} bytes"
                    )
            if piece and (len(piece) >= _PIECE_BYTES or not data):
                statistics.bytes_received += len(piece)
                await writer.write(piece)
                piece = bytearray()
            if not data:
                break
        await writer.flush()

    def _check_position(self, request: web.Request, writer: BlobWriter) -> None:
        """Refuse a chunk that does not continue the upload: specification, "Pushing in chunks"."""
        text = request.headers.get("Content-Range")
        if text is not None:
            match = _RANGE.fullmatch(text.removeprefix("bytes "))
            if match is None or int(match[1]) != writer.size_bytes:
                info = request.match_info
                headers = {
                    "Range": f"0-{max(writer.size_bytes - 1, 0)}",
                    "Location": f"/v2/{info['capability']}/{info['repository']}"
                    f"/blobs/uploads/{info.get('upload', '')}",
                }
                raise RegistryError(
                    416, "BLOB_UPLOAD_INVALID", "the chunk is out of order", headers=headers
                )
        length = request.content_length
        if length is not None and writer.size_bytes + length > self._max_blob_bytes:
            raise RegistryError(
                413, "SIZE_INVALID", f"a blob may have {self._max_blob_bytes} bytes"
            )


def _digest(text: str) -> str:
    if not is_digest(text):
        raise RegistryError(400, "DIGEST_INVALID", "this is no sha256 digest")
    return text


def _created(request: web.Request, digest: str) -> web.Response:
    info = request.match_info
    return web.Response(
        status=201,
        headers={
            "Location": f"/v2/{info['capability']}/{info['repository']}/blobs/{digest}",
            "Docker-Content-Digest": digest,
        },
    )
