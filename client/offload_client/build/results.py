"""What a build leaves at the client: files, archives, images, and the files that name them."""

from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload_client.build.metadata import (
    called_value,
    decoded,
    warning_values,
    with_warnings,
)
from offload_client.build.outputfiles import (
    check_destinations,
    check_file,
    is_special,
    read_file,
    replace_file,
    write_descriptor,
    write_file,
)
from offload_core.errors import ConfigError, InternalError
from offload_core.reference import normalise_reference
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from offload_client.build.imagesource import NodeImageSource
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.invocation import Invocation
    from offload_client.load.progress import LoadResult
    from offload_client.load.source import ImageSource
    from offload_client.progress.display import Display
    from offload_client.progress.summary import Totals
    from offload_proto.v1.events_pb2 import ProgressBatch, VertexWarning
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
        self._warnings: list[VertexWarning] = []
        self._loaded: LoadResult | None = None

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

    def may_rewrite(self, index: int) -> bool:
        """Return whether an output that was begun can be written once more, from its beginning.

        A file appears when it is whole, and the files of a directory are replaced; what went into
        a pipe cannot be taken back.
        """
        output = self._outputs[index]
        if output.type == "local":
            return True
        return output.dest != "-" and not is_special(self._invocation.path(output.dest))

    def begin_again(self) -> None:
        """Forget what the progress of a lost run has told."""
        self._warnings.clear()

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

    async def hand_over(self, number: int, archive: Path) -> None:
        """Bring an archive that was made here to the destination of an output.

        Args:
            number: of the output.
            archive: the file.

        Raises:
            ConfigError: the destination cannot be written.
            BrokenPipeError: nobody reads standard output any more.
        """
        dest = self._outputs[number].dest
        async with aclosing(read_file(archive)) as stream:
            if dest == "-":
                await self._to_stdout(stream)
            else:
                await write_file(self._invocation.path(dest), stream)

    async def _to_stdout(self, stream: AsyncIterator[bytes]) -> None:
        self._invocation.stdout.flush()
        try:
            await write_descriptor(self._invocation.stdout.fileno(), stream)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot write to standard output: {error.strerror}") from error

    async def deliver(self, result: Result, source: ImageSource) -> None:
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

        # As in buildx: tags take the place of names that an output has.
        names = dict.fromkeys(self._options.tags)
        for output in loads if not names else ():
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
            self._loaded = loaded
            step.log(
                f"{loaded.layers_received} layers received "
                f"({format_size(loaded.bytes_received)}), {loaded.layers_reused} were there"
            )

    def totals(self, result: Result) -> Totals:
        """Return the numbers of a build that worked, with those of its way back."""
        from offload_client.progress.summary import Totals

        totals = Totals.of(result.stats)
        if (loaded := self._loaded) is None:
            return totals
        return replace(
            totals,
            loaded=True,
            loaded_layers=loaded.layers_received,
            reused_layers=loaded.layers_reused,
            loaded_bytes=loaded.bytes_received,
        )

    async def _write_cache(self, layout: CacheLayout, source: ImageSource) -> None:
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
        if self._options.metadata_file:
            metadata = self.metadata(result, build_id, node_id)
            text = json.dumps(metadata, indent=2, sort_keys=True)
            replace_file(self._invocation.path(self._options.metadata_file), text)
        if self._options.iidfile:
            replace_file(self._invocation.path(self._options.iidfile), self.image_id(result))

    def metadata(self, result: Result, build_id: str, node_id: str) -> dict[str, Any]:
        """Return what --metadata-file says of the build, with the keys of docker buildx."""
        if self._options.call is not None:
            notes = result.success.call_result.items()
            return {key: called_value(key, value) for key, value in notes}
        metadata = {key: decoded(value) for key, value in result.success.exporter_response.items()}
        metadata["buildx.build.ref"] = f"offload/{node_id}/{build_id}"
        # BuildKit only knows the name in the pool's registry.
        metadata.pop("image.name", None)
        names = self._options.tags or [name for out in self._outputs for name in _names(out)]
        if names:
            metadata["image.name"] = ",".join(dict.fromkeys(names))
        if self._warnings:
            metadata["buildx.build.warnings"] = warning_values(self._warnings)
        return metadata

    def take_progress(self, batch: ProgressBatch) -> None:
        """Remember warnings, where the metadata file is to have them."""
        if self._options.metadata_file and with_warnings(self._invocation.environment):
            self._warnings.extend(batch.warnings)

    def adopt_warnings(self, part: Results) -> None:
        """Take over the warnings of a part of the build."""
        self._warnings.extend(part._warnings)

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
