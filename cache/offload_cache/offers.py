"""What a build is given to import: one cache manifest that lists only blobs it can really get."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_cache.manifests import MAX_MANIFEST_BYTES, parse_cache_manifest, select_layers
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_cache.entries import CacheEntry
    from offload_cache.scopes import ScopeIndex
    from offload_cache.tiered import ProjectStore

_log = structlog.get_logger(__name__)

_PREPARE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Offer:
    """A cache manifest as it is served.

    Attributes:
        body: the manifest; its configuration blob is on this node's disk.
        digest: of `body`.
        media_type: of `body`.
        entry: where it comes from.
        listed: layers that it lists.
        withheld: layers that it does not list because their blobs are not to be had.
    """

    body: bytes
    digest: str
    media_type: str
    entry: CacheEntry
    listed: int
    withheld: int


class OfferDesk:
    """Chooses and renders the one manifest that a build imports.

    Importing several manifests does not unite them in BuildKit (see docs/architecture.md), so the
    choice is made here: today the best candidate that is usable. This is also the place where the
    candidates become one unified manifest.
    """

    def __init__(self, store: ProjectStore, scopes: ScopeIndex) -> None:
        self._store = store
        self._scopes = scopes

    async def offer(self, read_scopes: Sequence[str], key: str) -> Offer | None:
        """Return the manifest to import now, None when no scope has a usable one.

        It is rendered anew at every call: blobs that a read proved to be missing meanwhile are
        withheld.
        """
        for entry in await self._scopes.candidates(read_scopes, key):
            try:
                async with asyncio.timeout(_PREPARE_SECONDS):
                    offer = await self._render(entry)
            except (NotFoundError, UsageError, TimeoutError) as error:
                _log.info("cache.entry.unusable", scope=entry.scope, cause=str(error))
                continue
            if offer is not None:
                return offer
        return None

    async def _render(self, entry: CacheEntry) -> Offer | None:
        body, _ = await asyncio.gather(
            self._store.read_blob(entry.manifest_digest, max_bytes=MAX_MANIFEST_BYTES),
            self._store.open_blob(entry.config_digest),
        )
        manifest = parse_cache_manifest(body)
        keep = {layer.digest for layer in manifest.layers if self._store.is_offerable(layer.digest)}
        if not keep:
            return None
        rendered = select_layers(manifest, body, keep)
        listed = sum(layer.digest in keep for layer in manifest.layers)
        return Offer(
            body=rendered,
            digest=sha256_digest(rendered),
            media_type=manifest.media_type,
            entry=entry,
            listed=listed,
            withheld=len(manifest.layers) - listed,
        )
