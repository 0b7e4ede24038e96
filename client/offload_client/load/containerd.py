"""Engines with containerd's store: they pull from a loopback registry and decide what they lack.

The pull names the image by its digest at a random name and port; then the user's names are given
and the random one is removed. An engine that cannot reach this machine's loopback gets an OCI
layout instead.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog
from offload_core.aio import finish
from offload_core.errors import NotFoundError

from offload_client.load.engine import EngineError
from offload_client.load.image import (
    Manifest,
    choose_children,
    read_manifest,
    read_platform_image,
)
from offload_client.load.ocilayout import load_layout
from offload_client.load.registry import LoopbackRegistry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.load.engine import Engine
    from offload_client.load.image import Root
    from offload_client.load.ledger import LoadLedger
    from offload_client.load.names import ImageName
    from offload_client.load.platform import Platform
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_log = structlog.get_logger(__name__)

_CONTACT_SECONDS = 15.0
"""A reachable registry is contacted within milliseconds; a firewall may swallow the attempt."""

_SILENCE_SECONDS = 900.0
_UNTAG_SECONDS = 30.0
_GAP_ERRORS = ("not found", "no such file", "failed to resolve")


class _OutOfReachError(Exception):
    """The engine cannot connect to this machine's loopback."""


class _Part(NamedTuple):
    platform: Platform
    manifest: Manifest


class LayerCounts(NamedTuple):
    """Layers that travelled, and layers in all."""

    received: int
    total: int


class ContainerdLoad:
    """One load into one engine; `run` does it."""

    def __init__(
        self,
        engine: Engine,
        source: ImageSource,
        root: Root,
        names: Sequence[ImageName],
        meter: LoadMeter,
        ledger: LoadLedger,
    ) -> None:
        self._engine = engine
        self._source = source
        self._root = root
        self._names = names
        self._meter = meter
        self._ledger = ledger

    async def run(self, wanted: Sequence[Platform]) -> LayerCounts:
        """Load the image for the wanted platforms, default: the engine's own.

        Raises:
            EngineError: the engine refused the image or vanished.
            OffloadError: the image could not be fetched, or was not built for a platform.
        """
        parts = await self._parts(wanted)
        try:
            sent = await self._pull(parts)
        except _OutOfReachError:
            _log.info("image.load.loopback_unreachable", engine=str(self._engine.endpoint))
            sent = await self._send_layout(parts)
        layers = {layer.digest for part in parts for layer in part.manifest.layers}
        return LayerCounts(len(layers & sent), len(layers))

    async def _parts(self, wanted: Sequence[Platform]) -> list[_Part]:
        default = self._engine.info.platform
        if (manifest := self._root.manifest) is not None:
            # A pull must name the platform that the image is for, and only its configuration
            # tells.
            image = await read_platform_image(self._source, manifest, self._meter)
            return [_Part(image.platform, manifest)]
        return [
            _Part(child.platform or default, await read_manifest(self._source, child.descriptor))
            for child in choose_children(self._root, wanted, default)
        ]

    async def _pull(self, parts: Sequence[_Part]) -> set[str]:
        async with LoopbackRegistry(self._source, self._root, self._meter) as registry:
            reference = f"{registry.repository}@{self._root.descriptor.digest}"
            try:
                for part in parts:
                    await self._pull_platform(registry, reference, part.platform)
                self._meter.enter("tagging")
                for name in self._names:
                    await self._engine.tag(reference, name)
                if not self._names:
                    await self._keep_without_name(parts)
            except _OutOfReachError:
                raise
            except BaseException:
                await finish(self._untag(reference), _UNTAG_SECONDS)
                raise
            await finish(self._untag(reference), _UNTAG_SECONDS)
            return registry.served

    async def _pull_platform(
        self, registry: LoopbackRegistry, reference: str, platform: Platform
    ) -> None:
        pull = asyncio.ensure_future(
            self._engine.pull(
                reference, platform, registry.login, lambda: self._engine_works(registry)
            )
        )
        contact = asyncio.ensure_future(registry.contacted.wait())
        try:
            await asyncio.wait(
                {pull, contact}, timeout=_CONTACT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not pull.done() and not contact.done():
                raise _OutOfReachError
            while not pull.done():
                quiet = time.monotonic() - self._meter.active_at
                if quiet > _SILENCE_SECONDS:
                    raise EngineError(f"it said nothing for {quiet:.0f} seconds", "lost")
                await asyncio.wait({pull}, timeout=_SILENCE_SECONDS - quiet + 1)
            pull.result()
        except EngineError as error:
            if registry.failure is not None:
                raise registry.failure from error
            if not registry.contacted.is_set() and error.kind != "lost":
                raise _OutOfReachError from error
            raise
        finally:
            pull.cancel()
            contact.cancel()
            await asyncio.gather(pull, contact, return_exceptions=True)

    def _engine_works(self, registry: LoopbackRegistry) -> None:
        self._meter.touch()
        if registry.served and not registry.sending:
            self._meter.enter("unpacking")

    async def _keep_without_name(self, parts: Sequence[_Part]) -> None:
        """Give the image the nameless reference of a build without a tag.

        Removing the only name would remove the image. A layout without names makes the engine
        keep it as "dangling"; all its blobs have just been pulled, so none is sent.
        """
        blobs = {blob.digest for part in parts for blob in part.manifest.blobs}
        manifests = [part.manifest for part in parts]
        await load_layout(
            self._engine, self._source, self._root, manifests, (), self._meter, leave_out=blobs
        )

    async def _untag(self, reference: str) -> None:
        try:
            await self._engine.untag(reference)
        except EngineError as error:
            # "missing": the pull did not get so far.
            if error.kind != "missing":
                _log.warning("image.load.leftover_name", reference=reference, reason=str(error))

    async def _send_layout(self, parts: Sequence[_Part]) -> set[str]:
        manifests = [part.manifest for part in parts]
        manifests += await self._attestations(
            {manifest.descriptor.digest for manifest in manifests}
        )
        blobs = {blob.digest for manifest in manifests for blob in manifest.blobs}
        engine_id = self._engine.info.engine_id
        held = blobs & self._ledger.blobs(engine_id, await self._engine.image_ids())
        try:
            sent = await self._send_without(manifests, held)
        except EngineError as error:
            if not held or not any(words in str(error) for words in _GAP_ERRORS):
                raise
            _log.info("image.load.repeated_whole", reason=str(error))
            sent = await self._send_without(manifests, set())
        self._ledger.note(engine_id, self._root.descriptor.digest, blobs)
        return sent

    async def _send_without(self, manifests: Sequence[Manifest], held: set[str]) -> set[str]:
        return await load_layout(
            self._engine,
            self._source,
            self._root,
            manifests,
            self._names,
            self._meter,
            leave_out=held,
        )

    async def _attestations(self, about: set[str]) -> list[Manifest]:
        found: list[Manifest] = []
        for child in self._root.children:
            if child.attests in about:
                try:
                    found.append(await read_manifest(self._source, child.descriptor))
                except NotFoundError:
                    # An image is complete without them.
                    _log.info("image.load.attestation_missing", digest=child.descriptor.digest)
        return found
