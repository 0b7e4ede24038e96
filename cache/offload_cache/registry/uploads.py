"""Pushing blobs over HTTP: in one request, in two, in chunks, or by mounting one that is here.

Source: OCI distribution specification 1.1, "Pushing blobs".
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.registry.grants import IMAGE
from offload_cache.registry.responses import RegistryError, created, digest_of
from offload_cache.registry.sessions import UploadSession, ended_upload
from offload_core.errors import NotFoundError, OffloadError

if TYPE_CHECKING:
    from offload_cache.registry.grants import GrantState, Registry
    from offload_cache.registry.sessions import UploadLimits

_RANGE = re.compile(r"(?:bytes )?(\d{1,16})-(\d{1,16})(?:/(?:\d{1,16}|\*))?")


class UploadHandlers:
    """The endpoints below `/v2/<capability>/<repository>/blobs/uploads/`."""

    def __init__(self, registry: Registry, limits: UploadLimits) -> None:
        self._registry = registry
        self._limits = limits

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        uploads = f"{base}/blobs/uploads"
        upload = uploads + "/{upload}"
        return [
            web.post(uploads + "/", self.start),
            web.post(uploads, self.start),
            web.get(upload, self.progress, allow_head=False),
            web.patch(upload, self.append),
            web.put(upload, self.complete),
            web.delete(upload, self.cancel),
        ]

    async def start(self, request: web.Request) -> web.StreamResponse:
        """POST: mount a blob, push it in one request, or open an upload."""
        state, repository = self._registry.requested(request)
        state.check_write(repository)
        store = state.grant.cache.store
        if (mount := request.query.get("mount")) is not None:
            # What the project has can be pulled by its digest anyway, so `from` decides nothing.
            if await store.stat_blob(digest_of(mount)) is not None:
                store.statistics.blobs_mounted += 1
                self._link(state, repository, mount)
                return created(request, f"blobs/{mount}", mount)
        elif request.query.get("digest-algorithm", "sha256") != "sha256":
            raise RegistryError(400, "DIGEST_INVALID", "digests here are made with sha256")
        state.check_upload()
        session = UploadSession(uuid.uuid4().hex, store.ingest(), self._limits, store.statistics)
        state.uploads[repository, session.name] = session
        if mount is None and (digest := request.query.get("digest")) is not None:
            return await self._finish(request, state, session, digest)
        return _progress(request, session, status=202)

    async def progress(self, request: web.Request) -> web.StreamResponse:
        """GET of an upload: how far it is."""
        _, session = self._session(request)
        return _progress(request, session, status=204)

    async def append(self, request: web.Request) -> web.StreamResponse:
        """PATCH: the next chunk of an upload."""
        state, session = self._session(request)
        try:
            await self._receive(request, session)
        except NotFoundError as error:
            raise ended_upload() from error
        except (RegistryError, OffloadError) as error:
            if not isinstance(error, RegistryError) or error.status != 416:
                await self._end(request, state, session)
            raise
        # A connection that breaks ends nothing: the client asks how far it got and goes on.
        return _progress(request, session, status=202)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """PUT: the last chunk, if any, and the digest of the whole."""
        state, session = self._session(request)
        return await self._finish(request, state, session, request.query.get("digest", ""))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """DELETE of an upload."""
        state, session = self._session(request)
        await self._end(request, state, session)
        return web.Response(status=204)

    def _session(self, request: web.Request) -> tuple[GrantState, UploadSession]:
        state, repository = self._registry.requested(request)
        state.check_write(repository)
        session = state.uploads.get((repository, request.match_info["upload"]))
        if session is None:
            raise RegistryError(404, "BLOB_UPLOAD_UNKNOWN", "there is no such upload")
        return state, session

    async def _finish(
        self, request: web.Request, state: GrantState, session: UploadSession, digest: str
    ) -> web.Response:
        store = state.grant.cache.store
        try:
            digest_of(digest)
            await self._receive(request, session)
            # From its first moment on: the disk may be trimmed at any time.
            with store.lease([digest]):
                await session.writer.commit(digest)
                self._link(state, request.match_info["repository"], digest)
        except RegistryError as error:
            if error.status != 416:
                await self._end(request, state, session)
            raise
        except NotFoundError as error:
            raise ended_upload() from error
        except BaseException:
            # Whatever went wrong, the client starts this upload again from its beginning.
            await self._end(request, state, session)
            raise
        await self._end(request, state, session)
        return created(request, f"blobs/{digest}", digest)

    @staticmethod
    def _link(state: GrantState, repository: str, digest: str) -> None:
        state.lease(digest)
        if repository == IMAGE:
            state.image.removed.discard(digest)

    @staticmethod
    async def _end(request: web.Request, state: GrantState, session: UploadSession) -> None:
        state.uploads.pop((request.match_info["repository"], session.name), None)
        await session.writer.abort()

    async def _receive(self, request: web.Request, session: UploadSession) -> None:
        first, length = None, request.content_length
        if (text := request.headers.get("Content-Range")) is not None:
            match = _RANGE.fullmatch(text)
            if match is None or int(match[2]) < int(match[1]):
                raise _elsewhere(request, session, "the Content-Range is none")
            first = int(match[1])
            announced = int(match[2]) - first + 1
            if length is not None and length != announced:
                raise RegistryError(
                    400, "SIZE_INVALID", "Content-Range and Content-Length say different things"
                )
            length = announced
        try:
            await session.receive(request.content, first=first, length=length)
        except RegistryError as error:
            if error.status == 416:
                raise _elsewhere(request, session, str(error)) from error
            raise


def _location(request: web.Request, session: UploadSession) -> str:
    info = request.match_info
    return f"/v2/{info['capability']}/{info['repository']}/blobs/uploads/{session.name}"


def _elsewhere(request: web.Request, session: UploadSession, message: str) -> RegistryError:
    """Return the answer to a chunk that does not fit, with where the upload is."""
    headers = {"Location": _location(request, session), "Range": session.range}
    return RegistryError(416, "BLOB_UPLOAD_INVALID", message, headers=headers)


def _progress(request: web.Request, session: UploadSession, *, status: int) -> web.Response:
    return web.Response(
        status=status,
        headers={
            "Location": _location(request, session),
            "Docker-Upload-UUID": session.name,
            "Range": session.range,
        },
    )
