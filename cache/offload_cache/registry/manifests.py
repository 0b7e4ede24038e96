"""Manifests over HTTP: the cache that a build imports and exports, and the image it pushes.

Source: OCI distribution specification 1.1, "Pulling manifests", "Pushing Manifests", "Deleting
Manifests".
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.images import ImageDocument
from offload_cache.keys import image_key
from offload_cache.manifests import (
    CACHE_CONFIG_TYPE,
    MAX_MANIFEST_BYTES,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    parse_cache_manifest,
    parse_manifest,
)
from offload_cache.registry.grants import CACHE, EXPORT_TAG, Exported, HeldManifest
from offload_cache.registry.links import check_tag_room, referrer_of
from offload_cache.registry.responses import (
    RegistryError,
    accepted,
    created,
    matches_etag,
    not_deleted,
    not_modified,
    unknown_manifest,
)
from offload_cache.unify import empty_import
from offload_cache.uploadtable import UploadItem
from offload_core.digest import is_digest, sha256_digest
from offload_core.errors import DigestMismatchError, NotFoundError, UsageError

if TYPE_CHECKING:
    from offload_cache.registry.grants import GrantState, Registry
    from offload_cache.scopes import Published

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_BODY_SECONDS = 60.0
_IMAGE_CHECK_SECONDS = 600.0
_PARALLEL_CHECKS = 16
_MAX_TAGS_AT_ONCE = 100
_MAX_IMAGE_BLOBS = 10_000


class ManifestHandlers:
    """The endpoints below `/v2/<capability>/<repository>/manifests/`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes below `base`."""
        return [
            web.get(f"{base}/manifests/{{reference}}", self.pull, allow_head=True),
            web.put(f"{base}/manifests/{{reference}}", self.push),
            web.delete(f"{base}/manifests/{{reference}}", self.delete),
        ]

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of a manifest."""
        state, repository = self._registry.requested(request)
        reference = request.match_info["reference"]
        if is_digest(reference):
            manifest = await self._by_digest(state, repository, reference)
        elif _TAG.fullmatch(reference) is None:
            manifest = None
        elif repository == CACHE and reference != EXPORT_TAG:
            manifest = await self._import(state)
        else:
            tags = state.cache_tags if repository == CACHE else state.image.tags
            tagged = tags.get(reference)
            manifest = None
            if tagged is not None:
                manifest = await self._by_digest(state, repository, tagged)
        if manifest is None:
            raise unknown_manifest()
        if not accepts(request, manifest.media_type):
            raise RegistryError(
                404, "MANIFEST_UNKNOWN", f"the client does not accept {manifest.media_type}"
            )
        if matches_etag(request, manifest.digest):
            return not_modified(manifest.digest)
        if request.method == "GET":
            state.grant.cache.store.statistics.bytes_served += len(manifest.body)
        return web.Response(
            body=manifest.body,
            headers={
                "Content-Type": manifest.media_type,
                "Docker-Content-Digest": manifest.digest,
                "ETag": f'"{manifest.digest}"',
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
        if offer.own_key:
            grant.cache.scopes.note_use(grant.read_scopes, grant.entry_key)
        if grant.results is not None and grant.results.hold_all(offer.contributions):
            # It was asked for in case of news, and there are none.
            empty = empty_import()
            await grant.cache.store.put_blob(empty.config, empty.config_digest)
            state.lease(empty.config_digest)
            body = empty.manifest()
            manifest = HeldManifest(body, sha256_digest(body), OCI_MANIFEST)
        else:
            if grant.results is not None:
                grant.results.imported()
            state.lease(offer.config_digest)
            state.keep_shared(offer.layers)
            manifest = HeldManifest(offer.body, offer.digest, offer.media_type)
        state.hold(CACHE, manifest)
        return manifest

    async def _by_digest(
        self, state: GrantState, repository: str, digest: str
    ) -> HeldManifest | None:
        held = state.held.get((repository, digest))
        if repository == CACHE:
            # Other cache manifests are not served: what a build may import is decided by scopes.
            return held
        if digest in state.image.removed:
            return None
        if held is not None:
            return held
        pushed_as = state.image.manifests.get(digest, "")
        try:
            body = await state.grant.cache.store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
            return HeldManifest(body, digest, parse_manifest(body, pushed_as).media_type)
        except (NotFoundError, UsageError):
            return None  # UsageError: it is some other blob

    async def push(self, request: web.Request) -> web.StreamResponse:
        """PUT of a manifest, by tag or digest; by digest it may come with tags as parameters."""
        state, repository = self._registry.requested(request)
        state.check_push(repository)
        reference, tags = _names(request)
        body = await _read_body(request)
        digest = sha256_digest(body)
        if is_digest(reference) and reference != digest:
            raise DigestMismatchError(f"the manifest has digest {digest}, not {reference}")
        content_type = request.headers.get("Content-Type", "")
        state.grant.cache.store.statistics.bytes_received += len(body)
        headers = {}
        contribution = ""
        if repository == CACHE:
            check_tag_room(state.cache_tags, tags)
            media_type, published = await self._push_cache(state, body, content_type)
            publication = published.publication
            contribution = published.contribution.contribution_id if published.added else ""
            state.cache_tags.update(dict.fromkeys(tags, digest))
        else:
            manifest = parse_manifest(body, content_type)
            referrer = referrer_of(manifest, digest, len(body))
            state.image.check_room(digest, tags, referrer)
            media_type, publication = await self._push_image(state, body, digest, content_type)
            state.image.add(digest, media_type, tags, referrer)
            if referrer is not None:
                headers["OCI-Subject"] = referrer.subject
        state.lease(digest)
        state.hold(repository, HeldManifest(body, digest, media_type))
        for name in tags or [digest]:
            state.exports.append(Exported(repository, name, digest, publication, contribution))
        response = created(request, f"manifests/{digest}", digest)
        response.headers.update(headers)
        if tags and is_digest(reference):
            response.headers["OCI-Tag"] = ", ".join(tags)
        return response

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """DELETE of a tag, or of a manifest with all its tags, from the image repository."""
        state, repository = self._registry.requested(request)
        if repository == CACHE:
            raise not_deleted("GET,HEAD,PUT")
        image, reference = state.image, request.match_info["reference"]
        if is_digest(reference):
            if await self._by_digest(state, repository, reference) is None:
                raise unknown_manifest()
            image.remove(reference)
            state.held.pop((repository, reference), None)
        elif image.tags.pop(reference, None) is None:
            raise unknown_manifest()
        state.exports = [
            export
            for export in state.exports
            if export.repository != repository or reference not in {export.reference, export.digest}
        ]
        return accepted()

    async def _push_cache(
        self, state: GrantState, body: bytes, content_type: str
    ) -> tuple[str, Published]:
        grant = state.grant
        manifest = parse_cache_manifest(body, content_type)
        if manifest.config is not None and not grant.cache.store.disk.has(manifest.config.digest):
            raise _unknown_content(manifest.config.digest)
        published = await grant.cache.scopes.publish(
            grant.write_scope or "", grant.entry_key, body, writer=grant.writer
        )
        return manifest.media_type, published

    async def _push_image(
        self, state: GrantState, body: bytes, digest: str, content_type: str
    ) -> tuple[str, int | None]:
        store = state.grant.cache.store
        manifest = parse_manifest(body, content_type)
        await self._check_content(state, manifest)
        await store.put_blob(body, digest)
        if manifest.config is not None and manifest.config.media_type == CACHE_CONFIG_TYPE:
            return (
                manifest.media_type,
                None,
            )  # a cache for the build's client, who takes it from here
        # Stages: what an index names was pushed, and so queued, before it.
        blobs = await self._image_blobs(state, manifest)
        document = ImageDocument(
            digest, state.grant.writer.build_id, ((digest, len(body)), *blobs.items())
        )
        # Last the document that keeps them: without it a collection takes all of this away.
        key = image_key(store.project_id, digest)
        publication = await store.publish(
            key, [list(blobs), [digest], [UploadItem.for_document(2, key, document.to_bytes())]]
        )
        return manifest.media_type, publication

    async def _image_blobs(self, state: GrantState, manifest: Manifest) -> dict[str, int]:
        """Return all blobs below a manifest, with their sizes in bytes."""
        found = {blob.digest: blob.size_bytes for blob in manifest.blobs}
        waiting = list(manifest.children)
        while waiting and len(found) < _MAX_IMAGE_BLOBS:
            child = waiting.pop()
            if child.digest in found:
                continue
            found[child.digest] = child.size_bytes
            # A client does not push again what is there, so an index keeps its images itself.
            with contextlib.suppress(NotFoundError):
                body = await state.grant.cache.store.read_blob(
                    child.digest, max_bytes=MAX_MANIFEST_BYTES
                )
                below = parse_manifest(body)
                found |= {blob.digest: blob.size_bytes for blob in below.blobs}
                waiting += below.children
        return found

    async def _check_content(self, state: GrantState, manifest: Manifest) -> None:
        """Refuse an image that could not be pulled: each blob is here or was seen lately."""
        store = state.grant.cache.store
        gate = asyncio.Semaphore(_PARALLEL_CHECKS)

        async def check(blob: Descriptor) -> None:
            if blob.digest in state.image.removed:
                raise _unknown_content(blob.digest)
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


def accepts(request: web.Request, media_type: str) -> bool:
    """Return whether a client takes this kind of manifest; one that says nothing takes all.

    Weights are no matter: there is one representation. Source: RFC 9110, section 12.5.1.
    """
    named = {
        part.partition(";")[0].strip().lower()
        for value in request.headers.getall("Accept", [])
        for part in value.split(",")
    }
    named.discard("")
    return not named or bool(named & {media_type.lower(), "*/*", "application/*"})


def _names(request: web.Request) -> tuple[str, list[str]]:
    """Return the reference of a push, and the tags that it makes."""
    reference = request.match_info["reference"]
    tags = [reference]
    if is_digest(reference):
        tags = list(dict.fromkeys(request.query.getall("tag", [])))
        if len(tags) > _MAX_TAGS_AT_ONCE:
            raise RegistryError(414, "MANIFEST_INVALID", "these are too many tags at once")
    if any(_TAG.fullmatch(tag) is None for tag in tags):
        raise RegistryError(400, "MANIFEST_INVALID", "this is neither a tag nor a digest")
    return reference, tags


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
