"""Bytes between a call of a member and a connection into a session."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_builder.node.sessions.room import MAX_PIECE
from offload_core.aio import stop
from offload_core.errors import UsageError
from offload_core.gathering import Gathering, Pace
from offload_core.pieces import StreamPiece

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from offload_builder.node.sessions.calls import SessionCall
    from offload_builder.node.sessions.contract import EngineStream

ENGINE_END_SECONDS = 2.0
"""After an engine has ended its direction, for the client to end the other one."""


async def carry(
    call: SessionCall,
    pieces: AsyncIterator[StreamPiece],
    stream: EngineStream,
    count: Callable[[int, int], None],
    *,
    end_seconds: float | None = None,
) -> AsyncGenerator[StreamPiece, None]:
    """Yield what a connection says, and give it what the client sends, until both have ended.

    Whoever is slow holds up the other side: at most a few pieces are on their way, and small ones
    where many calls have some. The connection
    is of no use afterwards, and whoever has opened it closes it.

    Args:
        call: of the client; when the node ends it, the connection is cut.
        pieces: what the client sends.
        stream: the connection.
        count: hears of bytes from the client, and to it.
        end_seconds: how long the client may go on after the connection has said everything; None
            for as long as it likes.

    Raises:
        UsageError: the client sends a piece that is too large.
        OffloadError: the node has ended the call.
    """
    loop = asyncio.get_running_loop()
    said, pace = Gathering(), Pace()
    taking = loop.create_task(_take(call, pieces, stream, count, pace))
    # What cannot be written to any more is not read to the end either.
    taking.add_done_callback(lambda done: stream.cut() if _failed(done) else None)
    reading = loop.create_task(_read(call, stream, said, pace))
    call.on_end(stream.cut)
    try:
        while parts := await said.take(pace.moment, enough=call.piece):
            piece = StreamPiece(parts[0], more=parts[1:])
            count(0, piece.size)
            yield piece
            call.hold(-piece.size)
        call.check()
        await reading
        if not _failed(taking):
            yield StreamPiece(ended=True)
            await asyncio.wait((taking,), timeout=end_seconds)
        call.check()
        if taking.done() and not taking.cancelled():
            error = taking.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
    finally:
        stream.cut()
        await stop(taking, reading, expected=(Exception,))


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _read(call: SessionCall, stream: EngineStream, said: Gathering, pace: Pace) -> None:
    try:
        while data := await stream.read(call.piece):
            pace.read(len(data))
            call.hold(len(data))
            await said.put(data, most=call.piece)
            await pace.rest()
    except OSError:
        # It broke, or this side has cut it; for the client that is an end as any other.
        pass
    finally:
        said.end()


async def _take(
    call: SessionCall,
    pieces: AsyncIterator[StreamPiece],
    stream: EngineStream,
    count: Callable[[int, int], None],
    pace: Pace,
) -> None:
    async for piece in pieces:
        if piece.data:
            pace.answered()
            check_size(piece)
            call.count()
            count(len(piece.data), 0)
            call.hold(len(piece.data))
            await stream.write(piece.data, call.piece)
            call.hold(-len(piece.data))
        if piece.ended:
            break
    await stream.end()


def check_size(piece: StreamPiece) -> None:
    """Refuse a piece that would have the node keep too much.

    Raises:
        UsageError: it is too large.
    """
    if len(piece.data) > MAX_PIECE:
        raise UsageError(f"a piece has {len(piece.data)} bytes; the most is {MAX_PIECE}")
