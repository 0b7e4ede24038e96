"""Decompress a layer into a temporary file, for engines that cannot read its compression.

A tar header needs the size of the raw layer, which no manifest tells; so it has to be produced
before it can be sent.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from contextlib import aclosing, asynccontextmanager
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from offload_client.bytepipe import BytePipe, in_thread, stream_through
from offload_core.errors import ImageLoadError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator
    from pathlib import Path

    from offload_client.load.image import Compression, Layer

_PIECE_BYTES = 1 << 20


class RawLayer(NamedTuple):
    """A decompressed layer: its size, and its content once."""

    size_bytes: int
    content: AsyncGenerator[bytes]


@asynccontextmanager
async def raw_layer(
    compressed: AsyncGenerator[bytes], layer: Layer, directory: Path | None
) -> AsyncIterator[RawLayer]:
    """Hold a layer raw in a file without a name; its space is freed at the end.

    Raises:
        ImageLoadError: the layer is damaged, the disk is full or zstandard is not installed.
    """

    async def produce(pipe: BytePipe) -> None:
        async for piece in compressed:
            await pipe.write(piece)

    with _temporary_file(directory) as file:
        size = await stream_through(
            produce,
            lambda pipe: _decompress(pipe, file, layer),
            name="layer-spool",
        )
        async with aclosing(_content(file)) as content:
            yield RawLayer(size, content)


def _temporary_file(directory: Path | None) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix="offload-layer-", dir=directory)
    except OSError as error:
        raise ImageLoadError(
            f"cannot create a temporary file for a layer: {error.strerror}",
            hint="set TMPDIR to a directory that can be written",
        ) from error


async def _content(file: IO[bytes]) -> AsyncGenerator[bytes]:
    file.seek(0)
    while piece := await in_thread(lambda: file.read(_PIECE_BYTES), name="layer-read"):
        yield piece


def _decompress(pipe: BytePipe, file: IO[bytes], layer: Layer) -> int:
    hasher, size = hashlib.sha256(), 0
    try:
        for piece in _raw_pieces(pipe, layer.descriptor.compression):
            hasher.update(piece)
            size += file.write(piece)
        file.flush()
    except _BadDataError as error:
        raise _damaged(layer) from error
    except OSError as error:
        raise ImageLoadError(
            f"cannot hold a layer in a temporary file: {error.strerror}",
            hint="set TMPDIR to a directory with more space",
        ) from error
    if "sha256:" + hasher.hexdigest() != layer.diff_id:
        raise _damaged(layer)
    while pipe.read(_PIECE_BYTES):
        # The fetch checks the digest of what may follow the compressed data.
        continue
    return size


class _BadDataError(Exception):
    """Not in the compression that the media type says."""


def _raw_pieces(pipe: BytePipe, compression: Compression) -> Iterator[bytes]:
    # The pipe has the one method of a file that the decompressors call.
    stream = cast("IO[bytes]", pipe)
    if compression == "gzip":
        try:
            with gzip.GzipFile(fileobj=stream, mode="rb") as unzipped:
                while piece := unzipped.read(_PIECE_BYTES):
                    yield piece
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise _BadDataError from error
        return
    try:
        import zstandard
    except ImportError as error:
        raise ImageLoadError(
            "this container engine cannot read zstd layers, and the zstandard package that would "
            "unpack them is not installed",
            hint='install it with: pip install "offload-build[compress]"',
        ) from error
    decompressor = zstandard.ZstdDecompressor()
    try:
        with decompressor.stream_reader(stream, read_across_frames=True) as reader:
            while piece := reader.read(_PIECE_BYTES):
                yield piece
    except zstandard.ZstdError as error:
        raise _BadDataError from error


def _damaged(layer: Layer) -> ImageLoadError:
    return ImageLoadError(f"layer {layer.descriptor.digest} cannot be unpacked; it is damaged")
