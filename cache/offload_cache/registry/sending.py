"""Sending a verified file: whole or in part, with sendfile(2)."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING

from aiohttp import web

from offload_cache.registry.responses import RegistryError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_cache.statistics import CacheStatistics

_SLICE_BYTES = 16 << 20
_SLICE_SECONDS = 120.0
"""A client that takes less than 16 MiB in this time is too slow; its connection is closed."""
_BYTES = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class UnsatisfiableRangeError(Exception):
    """The client wants bytes that the content does not have."""


def parse_range(text: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return offset and length of the part that a Range header asks for.

    None means the whole: there is no header, or it is one that a server may ignore, such as one
    with several parts. Source: RFC 9110, section 14.

    Raises:
        UnsatisfiableRangeError: the content has no such bytes.
    """
    match = None if text is None else _BYTES.fullmatch(text.strip())
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        length = min(int(match[2]), size_bytes)
        if length == 0:
            raise UnsatisfiableRangeError
        return size_bytes - length, length
    first = int(match[1])
    last = int(match[2]) if match[2] else size_bytes - 1
    if match[2] and last < first:
        return None
    if first >= size_bytes:
        raise UnsatisfiableRangeError
    return first, min(last, size_bytes - 1) - first + 1


async def send_blob(
    request: web.Request, path: Path, digest: str, statistics: CacheStatistics
) -> web.StreamResponse:
    """Answer a GET of a blob. The caller holds a lease on it.

    Raises:
        FileNotFoundError: the file is gone; nothing was sent.
    """
    etag = f'"{digest}"'
    headers = {
        "Content-Type": "application/octet-stream",
        "Docker-Content-Digest": digest,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        # A digest names the same bytes for ever; a capability's content is nobody else's.
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        wanted = request.headers.get("Range")
        if request.headers.get("If-Range", etag) != etag:
            wanted = None
        try:
            part = parse_range(wanted, size_bytes)
        except UnsatisfiableRangeError:
            raise RegistryError(
                416,
                "SIZE_INVALID",
                f"the blob has {size_bytes} bytes",
                headers={"Content-Range": f"bytes */{size_bytes}"},
            ) from None
        offset, length = part or (0, size_bytes)
        response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
        if part is not None:
            last = offset + length - 1
            response.headers["Content-Range"] = f"bytes {offset}-{last}/{size_bytes}"
        response.content_length = length
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        end = offset + length
        while offset < end:
            if (transport := request.transport) is None:
                raise ConnectionResetError("the client has left")
            count = min(_SLICE_BYTES, end - offset)
            try:
                async with asyncio.timeout(_SLICE_SECONDS):
                    await loop.sendfile(transport, file, offset, count)
            except TimeoutError as error:
                transport.abort()
                raise ConnectionResetError("the client takes the blob too slowly") from error
            offset += count
        await response.write_eof()
    statistics.blob_hits += 1
    statistics.bytes_served += length
    return response
