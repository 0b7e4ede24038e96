"""Images of builds that are still here, as build contexts of other builds of the same member.

A bake target that builds upon another one names its image by digest, as an OCI layout of the
client. Where the other build's image is in the store of this node, BuildKit reads it from there
and nothing is asked of the client. By digest alone nobody reads another member's image.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import TYPE_CHECKING

from offload_builder.node.imagefiles import ImageFiles
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from offload_cache.tiered import ProjectStore

PIECE_BYTES = 1 << 20


class HeldImages:
    """The images of the builds of one project that are here; used in the event loop only."""

    def __init__(self) -> None:
        self._held: Counter[tuple[str, str]] = Counter()

    def add(self, member: str, digest: str) -> None:
        """Note an image of a build that has ended well, until `remove`."""
        self._held[member, digest] += 1

    def remove(self, member: str, digest: str) -> None:
        """Note that one build that had the image is gone."""
        self._held[member, digest] -= 1
        if self._held[member, digest] <= 0:
            del self._held[member, digest]

    def has(self, member: str, digest: str) -> bool:
        """Return whether a build of this member has made the image and is still here."""
        return (member, digest) in self._held


class NearImages:
    """The OCI layouts of one build that are images of other builds; as `NearBlobs`."""

    def __init__(
        self, held: HeldImages, member: str, store: ProjectStore, digests: Mapping[str, str]
    ) -> None:
        """Look for nothing yet.

        Args:
            held: images of the project's builds.
            member: whose build this is.
            store: of the project.
            digests: of the images, by the name of the layout that BuildKit uses.
        """
        self._held = held
        self._member = member
        self._store = store
        self._digests = digests
        self._found: dict[str, ImageFiles | None] = {}
        self._looking = asyncio.Lock()

    async def size(self, layout: str, digest: str) -> int | None:
        """Return the bytes of a blob, None when it is not here."""
        image = await self._image(layout)
        if image is None:
            return None
        try:
            # Looked up now, so that what is said to be here can be read.
            await image.path(digest)
            return image.size(digest)
        except NotFoundError:
            return None

    async def read(self, layout: str, digest: str, offset: int, size: int) -> AsyncGenerator[bytes]:
        """Yield `size` bytes of a blob from `offset` on.

        Raises:
            NotFoundError: it is not here.
        """
        image = await self._image(layout)
        if image is None:
            raise NotFoundError(f"the image {digest} is not on this node")
        path = await image.path(digest)
        try:
            # Not in a thread: if this ended meanwhile, nobody would close the file.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{digest} is no longer on this node") from error
        try:
            while size > 0:
                data = await asyncio.to_thread(os.pread, file, min(size, PIECE_BYTES), offset)
                if not data:
                    return
                offset += len(data)
                size -= len(data)
                yield data
        finally:
            os.close(file)

    async def _image(self, layout: str) -> ImageFiles | None:
        async with self._looking:
            if layout not in self._found:
                # Found once, it is read to the end, also when the other build leaves meanwhile.
                self._found[layout] = await self._look(self._digests.get(layout, ""))
            return self._found[layout]

    async def _look(self, digest: str) -> ImageFiles | None:
        if not digest or not self._held.has(self._member, digest):
            return None
        image = ImageFiles(self._store)
        try:
            await image.admit(digest)
        except NotFoundError:
            return None
        return image
