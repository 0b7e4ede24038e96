"""Copying bytes between a program on this machine and a node."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_core.aio import stop
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_client.sessions.localsocket import LocalSocket
    from offload_client.sessions.nodestream import NodeStream

BROKEN = (OSError, OffloadError)
LINGER_SECONDS = 5.0
"""How long a program may go on sending to somebody who listens no more."""


async def copy(
    receive: Callable[[], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]]
) -> None:
    """Send what is received until its end.

    One piece after the other: the buffers of sockets and of gRPC on both sides are full meanwhile,
    and more tasks here cost more than they win.

    Raises:
        OSError: the program's side broke.
        OffloadError: the node's side broke.
    """
    while data := await receive():
        await send(data)


async def carry(local: LocalSocket, node: NodeStream) -> bool:
    """Carry a connection until both directions have ended, or one is broken.

    Both ends belong to the caller, who closes them.

    Returns:
        Whether neither has broken.
    """

    async def upwards() -> None:
        await copy(local.receive, node.send)
        await node.half_close()
        # What comes back is for somebody as long as the socket is open.
        await local.until_hung_up()

    async def downwards() -> None:
        await copy(node.receive, local.send)
        await local.half_close()

    up, down = asyncio.ensure_future(upwards()), asyncio.ensure_future(downwards())
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        if not up.done() and down.exception() is None:
            await asyncio.wait((up,), timeout=LINGER_SECONDS)
        return all(way.done() and way.exception() is None for way in (up, down))
    finally:
        await stop(up, down, expected=BROKEN)
