"""What a build leaves at the client: files, archives, images, and the files that name them."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from offload_client.build.outputfiles import (
    check_destinations,
    check_file,
    replace_file,
    write_descriptor,
    write_file,
)
from offload_client.reference import normalise_reference
from offload_core.errors import ConfigError, InternalError
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from offload_client.build.imagesource import NodeImageSource
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import CacheLayout, OutputReady, Result


class Results:
    """Delivers the outputs of one build."""

    def __init__(
        self,
        invocation: Invocation,
        options: BuildOptions,
        outputs: Sequence[OutputOption],
        display: Display,
    ) -> None:
        self._invocation = invocation
        self._options = options
        self._outputs = outputs
        self._display = display
        self._loaded_id = ""

    def prepare(self) -> None:
        """Refuse destinations that cannot work, and remove an image id of a former build.

        Raises:
            InvalidValueError: a destination is of the wrong kind.
            ConfigError: a destination cannot be written.
        """
        check_destinations(self._invocation, self._outputs)
        if self._options.caches.exports:
            from offload_client.build.localcaches import check_local_exports

            check_local_exports(self._invocation, self._options.caches.exports)
        for name in (self._options.metadata_file, self._options.iidfile):
            if name:
                check_file(self._invocation.path(name))
        if self._options.iidfile:
            # As docker does: when the build fails, no stale id is left.
            path = self._invocation.path(self._options.iidfile)
            try:
                if path.is_file():
                    path.unlink()
            except OSError as error:
                raise ConfigError(f"cannot remove {path}: {error.strerror}") from error

    async def receive(self, ready: OutputReady, source: NodeImageSource) -> None:
        """Write the stream of one exporter to its destination.

        Raises:
            ConfigError: the destination cannot be written.
            BrokenPipeError: nobody reads standard output any more.
        """
        output = self._outputs[ready.output_index]
        stream = source.output(ready.output_index)
        if output.type == "local":
            from offload_client.archive import unpack_archive

            await unpack_archive(stream, self._invocation.path(output.dest))
        elif output.dest == "-":
            await self._to_stdout(stream)
        else:
            await write_file(self._invocation.path(output.dest), stream)

    async def _to_stdout(self, stream: AsyncIterator[bytes]) -> None:
        self._invocation.stdout.flush()
        try:
            await write_descriptor(self._invocation.stdout.fileno(), stream)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot write to standard output: {error.strerror}") from error

    async def deliver(self, result: Result, source: NodeImageSource) -> None:
        """Load the image into the local engine, write caches, where that was asked for.

        Raises:
            ImageLoadError: the engine is not there or refuses.
            ConfigError: the directory of a cache cannot be written.
        """
        for layout in result.success.cache_layouts:
            await self._write_cache(layout, source)
        loads = [output for output in self._outputs if output.load]
        if not loads:
            return
        image = result.success.image
        if not image.digest:
            raise InternalError("the node has built no image to load")
        from offload_client.load.loader import load_image

        names = dict.fromkeys(self._options.tags)
        for output in loads:
            names |= dict.fromkeys(_names(output))
        with self._display.local_step("[offload] loading image into docker") as step:
            loaded = await load_image(
                source,
                image.digest,
                list(names),
                platforms=self._options.platforms,
                environment=self._invocation.environment,
                progress=lambda now: step.progress(
                    "receiving layers", now.bytes_received, now.bytes_total
                ),
            )
            self._loaded_id = loaded.image_id
            step.log(
                f"{loaded.layers_received} layers received "
                f"({format_size(loaded.bytes_received)}), {loaded.layers_reused} were there"
            )

    async def _write_cache(self, layout: CacheLayout, source: NodeImageSource) -> None:
        from offload_client.build.localcaches import receive_cache

        cache = self._options.caches.exports[layout.export_index]
        with self._display.local_step("[offload] writing cache to client directory") as step:
            received = await receive_cache(self._invocation, cache, layout.manifest, source)
            step.log(f"{format_size(received)} received")

    def write_files(self, result: Result, build_id: str, node_id: str) -> None:
        """Write --metadata-file and --iidfile.

        Raises:
            ConfigError: a file cannot be written.
        """
        response = dict(result.success.exporter_response)
        if self._options.metadata_file:
            metadata = {key: _decoded(value) for key, value in sorted(response.items())}
            metadata["buildx.build.ref"] = f"offload/{node_id}/{build_id}"
            # BuildKit only knows the name in the pool's registry.
            metadata.pop("image.name", None)
            given = [*self._options.tags, *(name for out in self._outputs for name in _names(out))]
            if given:
                metadata["image.name"] = ",".join(dict.fromkeys(given))
            text = json.dumps(metadata, indent=2, sort_keys=True)
            replace_file(self._invocation.path(self._options.metadata_file), text)
        if self._options.iidfile:
            replace_file(self._invocation.path(self._options.iidfile), self.image_id(result))

    def image_id(self, result: Result) -> str:
        """Return the image id: the one of the local engine after --load, else as buildx does.

        That is the config's digest, or the manifest's when there are several platforms. An engine
        with the containerd store knows an image by its manifest or index only.
        """
        if self._loaded_id:
            return self._loaded_id
        response = result.success.exporter_response
        for key in ("containerimage.config.digest", "containerimage.digest"):
            if response.get(key):
                return response[key]
        return result.success.image.digest


def _names(output: OutputOption) -> list[str]:
    text = output.attributes.get("name", "")
    return [normalise_reference(name) for name in text.split(",") if name]


def _decoded(value: str) -> Any:
    """Return structured values as such: BuildKit sends descriptors as base64 of JSON."""
    try:
        decoded = json.loads(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return value
    return decoded if decoded and isinstance(decoded, (dict, list)) else value
