"""Tar archives written into a pipe piece by piece; sizes are known before, content is streamed."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from offload_client.bytepipe import BytePipe

_BLOCK = tarfile.BLOCKSIZE


class TarStream:
    """Writes members in order; `finish` ends the archive."""

    def __init__(self, pipe: BytePipe) -> None:
        self._pipe = pipe

    async def add(self, name: str, data: bytes) -> None:
        """Write a small file."""
        padding = bytes(-len(data) % _BLOCK)
        await self._pipe.write(_header(name, len(data)) + data + padding)

    async def add_stream(self, name: str, size_bytes: int, content: AsyncIterable[bytes]) -> None:
        """Write a file of exactly `size_bytes`.

        Raises:
            ValueError: the content is longer or shorter; the archive must be given up.
        """
        await self._pipe.write(_header(name, size_bytes))
        left = size_bytes
        async for piece in content:
            left -= len(piece)
            if left < 0:
                raise ValueError(f"{name} is longer than {size_bytes} bytes")
            await self._pipe.write(piece)
        if left:
            raise ValueError(f"{name} is {left} bytes shorter than {size_bytes}")
        await self._pipe.write(bytes(-size_bytes % _BLOCK))

    async def finish(self) -> None:
        """Write the end of the archive: two blocks of zeros."""
        await self._pipe.write(bytes(2 * _BLOCK))


def _header(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    return member.tobuf(tarfile.GNU_FORMAT)
