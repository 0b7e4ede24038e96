"""Where the bytes of an image come from: the node that built it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ImageSource(Protocol):
    """Read access to one image's content by digest.

    Several calls may run at the same time. Both methods raise errors of `offload_core.errors`:
    `NotFoundError` for an unknown digest; with a `retryable` error in the middle of a blob the
    caller continues at the offset that it has reached.
    """

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        """Return the media type and the exact bytes of a manifest or index."""
        ...

    def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Stream a blob from `offset` to its end; pieces of 256 KiB to 1 MiB are best."""
        ...
