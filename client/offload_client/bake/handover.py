"""The image of a target as a build context of another one.

The dependent build names the image by its digest, as an OCI layout of the client. The node that
made the image serves it from its own store, so nothing travels. Only a node that does not have it
asks this client, which then fetches it from the other node.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_client.build.outputfiles import write_file
from offload_client.bytepipe import in_thread
from offload_client.context.ocilayout import LayoutSource
from offload_client.context.source import DirectorySource
from offload_client.load.fetch import verified_blob
from offload_client.load.image import Descriptor
from offload_client.load.progress import LoadMeter
from offload_core.aio import finish
from offload_core.errors import BuildCanceledError, InternalError
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from offload_client.context.entries import ContextItem
    from offload_client.context.source import ContentReader, Selection
    from offload_client.load.source import ImageSource
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import Result

CLOSE_SECONDS = 5.0
KEEP_SECONDS = 120.0
STEP = "[offload] fetching the image from the node that made it"


class BuiltImage:
    """The image of one target, from its build's end until nobody needs it any more.

    The build's connection to its node stays open for as long, because that keeps the image
    readable; the node's slot is free.
    """

    def __init__(self, target: str, users: int, directory: str | None) -> None:
        """Expect an image.

        Args:
            target: name of the target.
            users: how many contexts of other targets are this image.
            directory: where temporary files go; None for the usual place.
        """
        self._target = target
        self._users = users
        self._directory = directory
        self._ready = asyncio.Event()
        self._released = asyncio.Event()
        self._digest = ""
        self._source: ImageSource | None = None
        self._display: Display
        self._folder: Path | None = None
        self._fetching: asyncio.Task[Path] | None = None

    async def hold(self, result: Result, source: ImageSource) -> None:
        """Offer the image of a build that worked, until it is not needed any more.

        Raises:
            InternalError: the node made none.
        """
        self._digest = result.success.image.digest
        if not self._digest:
            raise InternalError(f"the node has built no image of target {self._target}")
        self._source = source
        self._ready.set()
        while self._users > 0:
            try:
                async with asyncio.timeout(KEEP_SECONDS):
                    await self._released.wait()
            except TimeoutError:
                # A node sends a client away that fetches nothing for long.
                await source.manifest(self._digest)

    async def wait(self) -> str:
        """Return the digest, once the image is built."""
        await self._ready.wait()
        return self._digest

    def leave(self) -> None:
        """Tell that one user does not need it any more."""
        self._users -= 1
        if self._users <= 0:
            self._released.set()

    def as_source(self, display: Display) -> ImageLayout:
        """Return the image as a local source, fetched when the node asks for it.

        Args:
            display: tells of the fetching.
        """
        self._display = display
        return ImageLayout(self, asyncio.get_running_loop())

    async def fetched(self) -> Path:
        """Return an OCI layout with the image; several may wait for it.

        Raises:
            OffloadError: the node that made it cannot be read.
        """
        if self._fetching is None:
            self._fetching = asyncio.ensure_future(self._fetch())
        return await asyncio.shield(self._fetching)

    @property
    def digest(self) -> str:
        """Of its manifest or index."""
        return self._digest

    async def _fetch(self) -> Path:
        folder = await in_thread(
            lambda: Path(tempfile.mkdtemp(prefix="offload-bake-", dir=self._directory)),
            name="bake-directory",
        )
        self._folder = folder
        blobs = folder / "blobs" / "sha256"
        await in_thread(lambda: blobs.mkdir(parents=True), name="bake-directory")
        meter = LoadMeter(lambda _progress: None)
        with self._display.local_step(STEP) as step:
            await self._fetch_manifest(self._digest, blobs, meter)
            step.log(f"{format_size(meter.bytes_received)} received")
        return folder

    async def _fetch_manifest(self, digest: str, blobs: Path, meter: LoadMeter) -> None:
        source = self._source
        if source is None:
            raise InternalError(f"target {self._target} is not built yet")
        _, body = await source.manifest(digest)
        await write_file(blobs / digest.partition(":")[2], _once(body))
        try:
            document: Mapping[str, Any] = json.loads(body)
            children = [str(item["digest"]) for item in document.get("manifests") or ()]
            content = [
                Descriptor(str(item["mediaType"]), str(item["digest"]), int(item["size"]))
                for item in (document.get("config"), *(document.get("layers") or ()))
                if item
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InternalError("the node wrote a manifest that cannot be read") from error
        for child in children:
            await self._fetch_manifest(child, blobs, meter)
        for blob in {blob.digest: blob for blob in content}.values():
            path = blobs / blob.digest.partition(":")[2]
            if not path.is_file():
                async with aclosing(verified_blob(source, blob, meter)) as pieces:
                    await write_file(path, pieces)

    async def close(self) -> None:
        """End a fetch and remove what it has written."""
        fetching, folder = self._fetching, self._folder
        if fetching is not None:
            fetching.cancel()
            await finish(asyncio.wait((fetching,)), CLOSE_SECONDS)
            if fetching.done() and not fetching.cancelled():
                # Its error has been told by those who waited for it.
                fetching.exception()
        if folder is not None:
            removing = in_thread(
                lambda: shutil.rmtree(folder, ignore_errors=True), name="bake-directory"
            )
            await finish(asyncio.wait((removing,)), CLOSE_SECONDS)


class ImageLayout:
    """A `BuiltImage` as `ContextSource`; scanned in a worker thread."""

    def __init__(self, image: BuiltImage, loop: asyncio.AbstractEventLoop) -> None:
        self._image = image
        self._loop = loop
        self._source: LayoutSource | None = None

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        """Fetch the image, and yield its blobs; see `ContextSource.scan`.

        Raises:
            BuildCanceledError: the command ends.
            OffloadError: the node that made the image cannot be read.
        """
        waiting = asyncio.run_coroutine_threadsafe(self._image.fetched(), self._loop)
        try:
            folder = waiting.result()
        except BaseException as error:
            # concurrent.futures has a CancelledError of its own.
            if waiting.cancelled():
                raise BuildCanceledError("canceled") from error
            raise
        directory = DirectorySource(folder, index_path=None)
        self._source = LayoutSource(directory, folder, self._image.digest)
        return self._source.scan(selection, warn=warn)

    def open(self) -> ContentReader:
        """Return a reader; see `ContextSource.open`.

        Raises:
            InternalError: the image was not scanned before.
        """
        if self._source is None:
            raise InternalError("the image of a target is read before it was listed")
        return self._source.open()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
