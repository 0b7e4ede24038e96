"""How the node and a worker process talk: messages with their length before them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from offload_core.errors import NodeLostError

if TYPE_CHECKING:
    import asyncio

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 20 << 20
"""More than the largest message of the API."""


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next message; None at the end.

    Raises:
        NodeLostError: it is too long.
        OSError: the connection broke.
        asyncio.IncompleteReadError: it ended within a message.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    except EOFError:
        return None
    if length > MAX_FRAME_BYTES:
        raise NodeLostError("a message of a synchronised directory is too long")
    return await reader.readexactly(length)


async def write_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write a message and wait until it is on its way.

    Raises:
        OSError: the connection is gone.
    """
    writer.write(_LENGTH.pack(len(data)))
    writer.write(data)
    await writer.drain()
