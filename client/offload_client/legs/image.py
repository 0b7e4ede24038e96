"""The image of several legs as one: its index is made here, its content stays at the nodes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from offload_core.errors import InternalError, NotFoundError
from offload_core.imageindex import JoinedIndex, join_indexes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from offload_client.load.source import ImageSource


class JoinedImage:
    """Implements `offload_client.load.source.ImageSource` over the sources of all legs.

    Args:
        index: of the whole image.
        owners: by the digest of each manifest, what returns the source that has it now; a leg
            that was lost and built again has another one.
    """

    def __init__(self, index: JoinedIndex, owners: Mapping[str, Callable[[], ImageSource]]) -> None:
        self.index = index
        self._owners = dict(owners)

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        """Return media type and bytes of the index, or of a manifest that it names."""
        if digest == self.index.digest:
            return self.index.media_type, self.index.raw
        source = self._source(digest)
        media_type, raw = await source().manifest(digest)
        try:
            document = json.loads(raw)
            below = (document.get("config"), *(document.get("layers") or ()))
            found = [str(item["digest"]) for item in below if item]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InternalError("the node wrote a manifest that cannot be read") from error
        for name in found:
            # A layer that two platforms share is at both nodes.
            self._owners.setdefault(name, source)
        return media_type, raw

    def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Return the bytes of a blob of a manifest that was read before."""
        return self._source(digest)().blob(digest, offset)

    def _source(self, digest: str) -> Callable[[], ImageSource]:
        source = self._owners.get(digest)
        if source is None:
            raise NotFoundError(f"{digest} is no part of the image")
        return source


async def join_images(
    parts: Sequence[tuple[str, Callable[[], ImageSource]]], platforms: Sequence[str]
) -> JoinedImage:
    """Return the image of which each leg has a part.

    Args:
        parts: the digest of each leg's index, and what returns where it can be read.
        platforms: of the whole build, in its order.
    """
    indexes: list[bytes] = []
    owners: dict[str, Callable[[], ImageSource]] = {}
    for digest, source in parts:
        _, raw = await source().manifest(digest)
        indexes.append(raw)
        for child in join_indexes([raw], platforms).children:
            owners.setdefault(child, source)
    return JoinedImage(join_indexes(indexes, platforms), owners)
