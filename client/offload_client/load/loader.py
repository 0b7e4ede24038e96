"""Entry: bring an image from the node into the user's container engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.eventlog import get_logger
from offload_client.load.connect import open_engine
from offload_client.load.containerd import ContainerdLoad
from offload_client.load.engineerror import EngineError
from offload_client.load.graphdriver import load_archive
from offload_client.load.image import (
    choose_children,
    read_manifest,
    read_platform_image,
    read_root,
)
from offload_client.load.ledger import LoadLedger
from offload_client.load.names import parse_image_name
from offload_client.load.platform import Platform
from offload_client.load.progress import LoadMeter, LoadResult
from offload_core.errors import ImageLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from offload_client.load.engine import Engine
    from offload_client.load.names import ImageName
    from offload_client.load.progress import LoadProgress
    from offload_client.load.source import ImageSource

_log = get_logger()


async def load_image(
    source: ImageSource,
    digest: str,
    tags: Sequence[str],
    *,
    platforms: Sequence[str] = (),
    environment: Mapping[str, str],
    progress: Callable[[LoadProgress], None],
) -> LoadResult:
    """Load an image into the engine that docker would use, moving only what it lacks.

    On cancellation the engine's request is broken off: it takes the whole image or nothing.

    Args:
        source: the node's content.
        digest: the image's index or manifest.
        tags: names for it; without any the image stays nameless, as with `docker build`.
        platforms: what to load of a multi-platform image; default: the only one, else the
            engine's own.
        environment: `DOCKER_HOST`, `DOCKER_CONTEXT`, `DOCKER_CONFIG`, `HOME`, `TMPDIR`,
            `XDG_CACHE_HOME`.
        progress: called on the event loop, at most every 50 ms and for each phase.

    Raises:
        ImageLoadError: no engine, or it did not take the image.
        UsageError: a tag or platform is not valid.
        ConfigError: docker's configuration cannot be read.
        OffloadError: what the source raised.
    """
    names = [parse_image_name(tag) for tag in tags]
    wanted = [Platform.parse(platform) for platform in platforms]
    meter = LoadMeter(progress)
    started = time.monotonic()
    meter.enter("checking")
    async with open_engine(environment) as engine:
        load = _Load(engine, source, digest, names, wanted, meter, environment)
        try:
            result = await load.run()
        except EngineError as error:
            raise _load_error(engine, error) from error
    meter.enter("done")
    _log.info(
        "image.loaded",
        image_id=result.image_id,
        containerd_store=engine.info.containerd_store,
        received_bytes=result.bytes_received,
        layers_received=result.layers_received,
        layers_reused=result.layers_reused,
        seconds=round(time.monotonic() - started, 3),
    )
    return result


class _Load:
    def __init__(
        self,
        engine: Engine,
        source: ImageSource,
        digest: str,
        names: Sequence[ImageName],
        wanted: Sequence[Platform],
        meter: LoadMeter,
        environment: Mapping[str, str],
    ) -> None:
        self._engine = engine
        self._source = source
        self._digest = digest
        self._names = names
        self._wanted = wanted
        self._meter = meter
        self._environment = environment

    async def run(self) -> LoadResult:
        if self._engine.info.containerd_store:
            return await self._into_containerd()
        return await self._into_graphdriver()

    async def _into_containerd(self) -> LoadResult:
        if await self._has_all_platforms():
            return await self._reuse(self._digest)
        root = await read_root(self._source, self._digest)
        ledger = LoadLedger.for_user(self._environment)
        load = ContainerdLoad(self._engine, self._source, root, self._names, self._meter, ledger)
        counts = await load.run(self._wanted)
        return await self._result(self._digest, counts.received, counts.total)

    async def _has_all_platforms(self) -> bool:
        if not self._engine.inspects_platforms:
            return not self._wanted and await self._engine.find_image(self._digest) is not None
        for platform in self._wanted or [self._engine.info.platform]:
            if await self._engine.find_image(self._digest, platform) is None:
                return False
        return True

    async def _into_graphdriver(self) -> LoadResult:
        if len(self._wanted) > 1:
            raise ImageLoadError(
                "this container engine holds one platform of an image, "
                f"{len(self._wanted)} were asked for",
                hint="load one platform, push the image to a registry, or turn on docker's "
                "containerd image store",
            )
        root = await read_root(self._source, self._digest)
        manifest = root.manifest
        if manifest is None:
            children = choose_children(root, self._wanted, self._engine.info.platform)
            manifest = await read_manifest(self._source, children[0].descriptor)
        image_id = manifest.config.digest
        if await self._engine.find_image(image_id) is not None:
            return await self._reuse(image_id)
        image = await read_platform_image(self._source, manifest, self._meter)
        spool = self._environment.get("TMPDIR")
        received = await load_archive(
            self._engine,
            self._source,
            image,
            self._names,
            self._meter,
            Path(spool) if spool else None,
        )
        total = len({layer.digest for layer in manifest.layers})
        return await self._result(image_id, received, total)

    async def _reuse(self, image_id: str) -> LoadResult:
        self._meter.enter("tagging")
        for name in self._names:
            await self._engine.tag(image_id, name)
        found = await self._engine.find_image(image_id)
        return LoadResult(image_id, 0, 0, found.layer_count if found is not None else 0)

    async def _result(self, image_id: str, received: int, total: int) -> LoadResult:
        if await self._engine.find_image(image_id) is None:
            raise ImageLoadError(
                f"the container engine at {self._engine.endpoint} took the image but does not "
                f"list {image_id}"
            )
        return LoadResult(image_id, self._meter.bytes_received, received, total - received)


def _load_error(engine: Engine, error: EngineError) -> ImageLoadError:
    if error.kind == "lost":
        return ImageLoadError(
            f"the container engine at {engine.endpoint} stopped answering: {error}",
            hint="is docker still running? The image can be loaded again without a new build",
        )
    hint = "free some space, for example with: docker system prune"
    return ImageLoadError(
        f"the container engine at {engine.endpoint} did not take the image: {error}",
        hint=hint if error.disk_full else "",
    )
