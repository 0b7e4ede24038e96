"""Engines whose layers live in overlay2 and the like: a docker-archive with gaps.

Such an engine takes an archive that leaves out the files of layers whose chain id it has; the list
in manifest.json stays complete. Source: moby image/tarexport/load.go (the layer store is asked for
the chain id before a layer's file is opened); tried on 20.10, 26, 28 and 29.
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING

from offload_client.eventlog import get_logger
from offload_client.load.ahead import FetchAhead
from offload_client.load.engineerror import EngineError
from offload_client.load.image import chain_ids
from offload_client.load.spool import raw_layer
from offload_client.load.tarstream import TarStream
from offload_core.digest import digest_hex

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from offload_client.bytepipe import BytePipe
    from offload_client.load.engine import Engine
    from offload_client.load.image import Layer, PlatformImage
    from offload_client.load.names import ImageName
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_log = get_logger()


async def load_archive(
    engine: Engine,
    source: ImageSource,
    image: PlatformImage,
    names: Sequence[ImageName],
    meter: LoadMeter,
    spool_directory: Path | None,
) -> int:
    """Load an image, sending only the layers whose chain the engine lacks.

    If a layer vanishes between the question and the load (docker image prune), the engine refuses
    the archive without a trace and the whole image is sent.

    Returns:
        Number of layers that travelled.

    Raises:
        EngineError: the engine refused the image or vanished.
        OffloadError: the image could not be fetched.
    """
    known = {chain for layers in await engine.layer_lists() for chain in chain_ids(layers)}
    missing = _distinct([layer for layer in image.layers if layer.chain_id not in known])
    everything = _distinct(image.layers)
    archive = _Archive(engine, source, image, names, meter, spool_directory)
    try:
        await archive.send(missing)
    except EngineError as error:
        # Engine 20.10 says "no such file", others may have other words.
        if len(missing) == len(everything) or error.kind == "lost" or error.disk_full:
            raise
        _log.info("image.load.repeated_whole", layers=len(everything), reason=str(error))
        await archive.send(everything)
        return len(everything)
    return len(missing)


class _Archive:
    def __init__(
        self,
        engine: Engine,
        source: ImageSource,
        image: PlatformImage,
        names: Sequence[ImageName],
        meter: LoadMeter,
        spool_directory: Path | None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._image = image
        self._names = names
        self._meter = meter
        self._spool_directory = spool_directory

    async def send(self, layers: Sequence[Layer]) -> None:
        self._meter.expect(sum(layer.descriptor.size_bytes for layer in layers), layers=len(layers))
        self._meter.enter("receiving")

        async def produce(pipe: BytePipe) -> None:
            tar = TarStream(pipe)
            config_name = f"{digest_hex(self._image.manifest.config.digest)}.json"
            manifest = {
                "Config": config_name,
                "RepoTags": [str(name) for name in self._names] or None,
                "Layers": [_file_name(layer) for layer in self._image.layers],
            }
            await tar.add("manifest.json", json.dumps([manifest]).encode())
            await tar.add(config_name, self._image.config_raw)
            blobs = [layer.descriptor for layer in layers]
            async with FetchAhead(self._source, blobs, self._meter) as ahead:
                for layer in layers:
                    async with aclosing(ahead.next()) as pieces:
                        await self._add(tar, layer, pieces)
                    self._meter.layer_received()
            await tar.finish()
            self._meter.enter("unpacking")

        await self._engine.load(produce, self._meter.touch)

    async def _add(self, tar: TarStream, layer: Layer, pieces: AsyncGenerator[bytes]) -> None:
        name = _file_name(layer)
        if self._as_is(layer):
            await tar.add_stream(name, layer.descriptor.size_bytes, pieces)
            return
        async with raw_layer(pieces, layer, self._spool_directory) as raw:
            await tar.add_stream(name, raw.size_bytes, raw.content)

    def _as_is(self, layer: Layer) -> bool:
        return layer.descriptor.compression != "zstd" or self._engine.reads_zstd_archives


def _distinct(layers: Sequence[Layer]) -> list[Layer]:
    """Leave out layers whose content is already in the list: one file serves all places."""
    return list({layer.descriptor.digest: layer for layer in layers}.values())


def _file_name(layer: Layer) -> str:
    return f"{digest_hex(layer.descriptor.digest)}/layer.tar"
