"""Manifests over HTTP: the cache that a build imports and exports, and the image it pushes.

Source: OCI distribution specification 1.1, "Pulling manifests", "Pushing manifests", "Content
discovery".
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.keys import blob_key
from offload_cache.manifests import (
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    parse_cache_manifest,
    parse_manifest,
)
from offload_cache.registry.grants import CACHE, EXPORT_TAG, Exported, HeldManifest
from offload_cache.registry.responses import RegistryError, unknown_manifest
from offload_core.digest import is_digest, sha256_digest
from offload_core.errors import DigestMismatchError, NotFoundError

if TYPE_CHECKING:
    from offload_cache.registry.grants import GrantState, Registry

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_BODY_SECONDS = 60.0
_IMAGE_CHECK_SECONDS = 600.0
_PARALLEL_CHECKS = 16


class ManifestHandlers:
    """The endpoints below `/v2/<capability>/<repository>/manifests/`, tags and referrers."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        return [
            web.get(f"{base}/manifests/{{reference}}", self.pull, allow_head=True),
            web.put(f"{base}/manifests/{{reference}}", self.push),
            web.get(f"{base}/tags/list", self.tags),
            web.get(f"{base}/referrers/{{digest}}", self.referrers),
        ]

    def _state(self, request: web.Request) -> tuple[GrantState, str]:
        state = self._registry.state(request.match_info["capability"])
        return state, request.match_info["repository"]

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of a manifest."""
        state, repository = self._state(request)
        reference = request.match_info["reference"]
        if is_digest(reference):
            manifest = await self._by_digest(state, repository, reference)
        elif _TAG.fullmatch(reference) is None:
            manifest = None
        elif repository == CACHE and reference != EXPORT_TAG:
            manifest = await self._import(state)
        else:
            manifest = state.tags[repository].get(reference)
        if manifest is None:
            raise unknown_manifest()
        if request.method == "GET":
            state.grant.cache.store.statistics.bytes_served += len(manifest.body)
        return web.Response(
            body=manifest.body,
            headers={
                "Content-Type": manifest.media_type,
                "Docker-Content-Digest": manifest.digest,
            },
        )

    async def _import(self, state: GrantState) -> HeldManifest | None:
        """Return the one manifest that this build may import, whatever the tag's name is."""
        grant = state.grant
        statistics = grant.cache.store.statistics
        offer = None
        if grant.may_import:
            offer = await grant.cache.offers.offer(grant.read_scopes, grant.entry_key)
        if offer is None:
            statistics.manifest_misses += 1
            return None
        statistics.manifest_hits += 1
        state.lease(offer.entry.config_digest)
        manifest = HeldManifest(offer.body, offer.digest, offer.media_type)
        state.hold(CACHE, manifest)
        return manifest

    async def _by_digest(
        self, state: GrantState, repository: str, digest: str
    ) -> HeldManifest | None:
        held = state.held.get((repository, digest))
        if held is not None or repository == CACHE:
            # Other cache manifests are not served: what a build may import is decided by scopes.
            return held
        try:
            body = await state.grant.cache.store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
            return HeldManifest(body, digest, parse_manifest(body).media_type)
        except NotFoundError:
            return None

    async def push(self, request: web.Request) -> web.StreamResponse:
        """PUT of a manifest, by tag or digest."""
        state, repository = self._state(request)
        state.check_write(repository)
        reference = request.match_info["reference"]
        if not is_digest(reference) and _TAG.fullmatch(reference) is None:
            raise RegistryError(400, "MANIFEST_INVALID", "this is neither a tag nor a digest")
        body = await _read_body(request)
        digest = sha256_digest(body)
        if is_digest(reference) and reference != digest:
            raise DigestMismatchError(f"the manifest has digest {digest}, not {reference}")
        content_type = request.headers.get("Content-Type", "")
        state.grant.cache.store.statistics.bytes_received += len(body)
        if repository == CACHE:
            media_type, publication = await self._push_cache(state, body, content_type)
        else:
            media_type, publication = await self._push_image(state, body, digest, content_type)
        state.lease(digest)
        held = HeldManifest(body, digest, media_type)
        state.hold(repository, held)
        if not is_digest(reference):
            state.tags[repository][reference] = held
        state.exports.append(Exported(repository, reference, digest, publication))
        info = request.match_info
        return web.Response(
            status=201,
            headers={
                "Location": f"/v2/{info['capability']}/{repository}/manifests/{digest}",
                "Docker-Content-Digest": digest,
            },
        )

    async def _push_cache(
        self, state: GrantState, body: bytes, content_type: str
    ) -> tuple[str, int | None]:
        grant = state.grant
        manifest = parse_cache_manifest(body, content_type)
        if manifest.config is not None and not grant.cache.store.disk.has(manifest.config.digest):
            raise _unknown_content(manifest.config.digest)
        published = await grant.cache.scopes.publish(
            grant.write_scope or "",
            grant.entry_key,
            body,
            build_id=grant.build_id,
            member=grant.member,
        )
        return manifest.media_type, published.publication

    async def _push_image(
        self, state: GrantState, body: bytes, digest: str, content_type: str
    ) -> tuple[str, int | None]:
        store = state.grant.cache.store
        manifest = parse_manifest(body, content_type)
        await self._check_content(state, manifest)
        await store.put_blob(body, digest)
        # Stages: what an index names was pushed, and so queued, before it.
        publication = await store.publish(
            blob_key(store.project_id, digest),
            [[blob.digest for blob in manifest.blobs], [digest]],
        )
        return manifest.media_type, publication

    async def _check_content(self, state: GrantState, manifest: Manifest) -> None:
        """Refuse an image that could not be pulled: each blob is here or was seen lately."""
        store = state.grant.cache.store
        gate = asyncio.Semaphore(_PARALLEL_CHECKS)

        async def check(blob: Descriptor) -> None:
            async with gate:
                size_bytes = await store.stat_blob(
                    blob.digest, max_age_seconds=_IMAGE_CHECK_SECONDS
                )
            if size_bytes is None:
                raise _unknown_content(blob.digest)
            if size_bytes != blob.size_bytes:
                raise RegistryError(400, "SIZE_INVALID", f"the size of {blob.digest} is wrong")

        results = await asyncio.gather(
            *(check(blob) for blob in [*manifest.blobs, *manifest.children]),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def tags(self, request: web.Request) -> web.StreamResponse:
        """GET of a repository's tags."""
        state, repository = self._state(request)
        name = f"{request.match_info['capability']}/{repository}"
        return web.json_response({"name": name, "tags": sorted(state.tags[repository])})

    async def referrers(self, request: web.Request) -> web.StreamResponse:
        """GET of referrers: not kept here; 404 sends clients to the tag scheme."""
        self._state(request)
        raise RegistryError(404, "UNSUPPORTED", "this registry keeps no referrers")


async def _read_body(request: web.Request) -> bytes:
    too_large = RegistryError(
        413, "MANIFEST_INVALID", f"a manifest may have {MAX_MANIFEST_BYTES} bytes"
    )
    if (request.content_length or 0) > MAX_MANIFEST_BYTES:
        raise too_large
    body = bytearray()
    async with asyncio.timeout(_BODY_SECONDS):
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > MAX_MANIFEST_BYTES:
                raise too_large
    return bytes(body)


def _unknown_content(digest: str) -> RegistryError:
    # 404, the status that the specification gives to MANIFEST_BLOB_UNKNOWN's cause.
    return RegistryError(404, "MANIFEST_BLOB_UNKNOWN", f"the manifest names {digest}, not here")
