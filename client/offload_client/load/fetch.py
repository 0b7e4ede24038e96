"""Take blobs from the node: verified, counted, continued after a lost connection."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from offload_client.eventlog import get_logger
from offload_core.errors import ImageLoadError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from offload_client.load.image import Descriptor
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_log = get_logger()

_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5


async def verified_blob(
    source: ImageSource, blob: Descriptor, meter: LoadMeter, offset: int = 0
) -> AsyncGenerator[bytes]:
    """Stream a blob; its last piece comes only after size and digest were found right.

    So a damaged blob never becomes complete at the receiver. With an `offset` only the size is
    checked, the receiver has the beginning. A connection that is lost is taken up again where it
    ended, three times without progress at most.

    Raises:
        ImageLoadError: size or digest are wrong.
        OffloadError: what the source raised.
    """
    hasher = hashlib.sha256()
    position, held = offset, b""
    failures = 0
    while True:
        try:
            async with aclosing(_as_generator(source.blob(blob.digest, position))) as pieces:
                async for piece in pieces:
                    position += len(piece)
                    failures = 0
                    meter.received(len(piece))
                    if position > blob.size_bytes:
                        raise ImageLoadError(
                            f"layer {blob.digest} is larger than its manifest says"
                        )
                    hasher.update(piece)
                    if held:
                        yield held
                    held = piece
            break
        except OffloadError as error:
            failures += 1
            if not error.retryable or failures >= _ATTEMPTS:
                raise
            _log.info("blob.transfer.resumed", digest=blob.digest, offset_bytes=position)
            await asyncio.sleep(_PAUSE_SECONDS * failures)
    if position != blob.size_bytes:
        raise ImageLoadError(
            f"layer {blob.digest} ended after {position} of {blob.size_bytes} bytes"
        )
    if offset == 0 and "sha256:" + hasher.hexdigest() != blob.digest:
        raise ImageLoadError(f"layer {blob.digest} arrived damaged; run the command again")
    if held:
        yield held


async def small_blob(
    source: ImageSource, blob: Descriptor, limit_bytes: int, meter: LoadMeter
) -> bytes:
    """Return a whole blob that is at most `limit_bytes` long.

    Raises:
        ImageLoadError: too large or damaged.
    """
    if blob.size_bytes > limit_bytes:
        raise ImageLoadError(f"{blob.digest} has {blob.size_bytes} bytes, expected a small blob")
    meter.expect(blob.size_bytes)
    async with aclosing(verified_blob(source, blob, meter)) as pieces:
        return b"".join([piece async for piece in pieces])


def _as_generator(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Give any iterator an `aclose`, so that a stream that is given up ends at once."""
    if hasattr(pieces, "aclose"):
        return cast("AsyncGenerator[bytes]", pieces)

    async def wrap() -> AsyncGenerator[bytes]:
        async for piece in pieces:
            yield piece

    return wrap()
