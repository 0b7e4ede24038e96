"""Engines with containerd's store: they pull from a loopback registry and decide what they lack.

The pull names the image by its digest at a random name and port; then the user's names are given
and the random one is removed. An engine that cannot reach this machine's loopback gets an OCI
layout instead.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from offload_client.bytepipe import in_thread
from offload_client.eventlog import get_logger
from offload_client.load.engineerror import EngineError
from offload_client.load.image import (
    Manifest,
    choose_children,
    read_manifest,
    read_platform_image,
)
from offload_client.load.ocilayout import load_layout
from offload_client.load.registry import LoopbackRegistry
from offload_core.aio import finish
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.load.engine import Engine
    from offload_client.load.image import Root
    from offload_client.load.ledger import LoadLedger
    from offload_client.load.names import ImageName
    from offload_client.load.platform import Platform
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_log = get_logger()

_CONTACT_SECONDS = 15.0
"""A reachable registry is contacted within milliseconds; a firewall may swallow the attempt."""

_SILENCE_SECONDS = 900.0
_UNTAG_SECONDS = 30.0
_GIVE_UP_SECONDS = 10.0


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
        if self._names:
            try:
                sent = await self._pull(parts)
            except _OutOfReachError:
                _log.info("image.load.loopback_unreachable", engine=str(self._engine.endpoint))
                sent = await self._send_layout(parts)
        else:
            # A pulled image goes away with the name of the pull; only a layout without names
            # makes the engine keep a nameless ("dangling") one.
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
            except _OutOfReachError:
                raise
            except BaseException as error:
                if not isinstance(error, EngineError) or error.kind != "lost":
                    await finish(self._untag(reference), _UNTAG_SECONDS)
                raise
            await finish(self._untag(reference), _UNTAG_SECONDS)
            await self._note(registry.served | await self._held(parts))
            return registry.served

    async def _pull_platform(
        self, registry: LoopbackRegistry, reference: str, platform: Platform
    ) -> None:
        pull = self._engine.pull(
            reference, platform, registry.login, lambda: self._engine_works(registry)
        )
        contact = asyncio.ensure_future(registry.contacted.wait())
        try:
            either: set[asyncio.Future[Any]] = {pull, contact}
            await asyncio.wait(
                either, timeout=_CONTACT_SECONDS, return_when=asyncio.FIRST_COMPLETED
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
            contact.cancel()
            if not pull.done():
                # So that the engine gives up before the name of the pull is removed.
                await registry.close()
                await finish(asyncio.wait({pull}, timeout=_GIVE_UP_SECONDS), _GIVE_UP_SECONDS + 1)

    def _engine_works(self, registry: LoopbackRegistry) -> None:
        self._meter.touch()
        if registry.served and not registry.sending:
            self._meter.enter("unpacking")

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
        held = await self._held(parts)
        try:
            sent = await self._send_without(manifests, held)
        except EngineError as error:
            if not held or error.kind == "lost" or error.disk_full:
                raise
            _log.info("image.load.repeated_whole", reason=str(error))
            held = set()
            sent = await self._send_without(manifests, held)
        await self._note(sent | held)
        return sent

    async def _held(self, parts: Sequence[_Part]) -> set[str]:
        """Return those of the image's blobs that the engine's content store surely has."""
        blobs = {blob.digest for part in parts for blob in part.manifest.blobs}
        image_ids = await self._engine.image_ids()
        engine_id = self._engine.info.engine_id
        known = await in_thread(lambda: self._ledger.blobs(engine_id, image_ids), name="ledger")
        return blobs & known

    async def _note(self, blobs: set[str]) -> None:
        engine_id, image_id = self._engine.info.engine_id, self._root.descriptor.digest
        await in_thread(lambda: self._ledger.note(engine_id, image_id, blobs), name="ledger")

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
