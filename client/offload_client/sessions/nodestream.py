"""Streams to the node of a session: connections to its engine and to its ports."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from offload_core.aio import stop
from offload_core.errors import NodeLostError, OffloadError
from offload_core.gathering import MANY_BYTES, Gathering
from offload_core.pieces import StreamPiece
from offload_core.status import error_from_rpc

if TYPE_CHECKING:
    from offload_proto.v1.session_node_service_pb2 import PortOpen

PIECE_BYTES = 1 << 20


@dataclass(slots=True)
class Traffic:
    """Bytes that have passed.

    Attributes:
        sent: to the node.
        received: from it.
    """

    sent: int = 0
    received: int = 0


def node_error(error: BaseException) -> OffloadError:
    """Return the error behind a broken stream to a node."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error, peer="the session's node", unreachable=NodeLostError)
    return NodeLostError("the connection to the session's node was lost")


class NodeStream:
    """One stream of bytes in both directions, by a call to the node."""

    def __init__(self, call: Any, traffic: Traffic) -> None:
        """Take a call.

        Args:
            call: a grpc.aio.StreamStreamCall of `StreamPiece`.
            traffic: counts its bytes.
        """
        self._call = call
        self._traffic = traffic
        self._ended = False
        self._outgoing = Gathering()
        self._sending: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has come to its end, or broken."""
        return bool(self._call.done())

    def when_done(self, then: Any) -> None:
        """Call a function without arguments once it has ended."""
        self._call.add_done_callback(lambda _: then())

    async def receive(self) -> bytes:
        """Return the next bytes; none at the end.

        Raises:
            OffloadError: the node is lost, or has ended it.
        """
        while not self._ended:
            try:
                piece = await self._call.read()
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                self._ended = True
                raise node_error(error) from error
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # The call was, and not whoever waits for it.
                self._ended = True
                raise NodeLostError("the connection to the session's node was closed") from None
            if piece is grpc.aio.EOF or piece.ended:
                self._ended = True
            elif piece.data:
                self._traffic.received += len(piece.data)
                data: bytes = piece.data
                return data
        return b""

    async def send(self, data: bytes) -> None:
        """Send bytes; many of them are on their way when this returns, and a few have gone.

        Raises:
            OffloadError: the node is lost, or has ended it.
        """
        if not data:
            return
        if self._sending is None and len(data) < MANY_BYTES:
            await self._send_piece(data)
            return
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all(), name="send")
        for at in range(0, len(data), PIECE_BYTES):
            part = data if len(data) <= PIECE_BYTES else data[at : at + PIECE_BYTES]
            if self._sending.done():
                self._sending.result()
            await self._outgoing.put(part)

    async def _send_all(self) -> None:
        try:
            while parts := await self._outgoing.take():
                await self._send_piece(*parts)
        finally:
            # Nobody waits for room any more.
            self._outgoing.end()

    async def _send_piece(self, data: bytes, *more: bytes) -> None:
        piece = StreamPiece(data, more=more)
        await self._write(piece)
        self._traffic.sent += piece.size

    async def half_close(self) -> None:
        """Say that no more comes; the other direction goes on.

        Raises:
            OffloadError: the node is lost, or has ended it.
        """
        if self._sending is not None:
            self._outgoing.end()
            await asyncio.shield(self._sending)
        await self._write(StreamPiece(ended=True))

    async def _write(self, message: StreamPiece | PortOpen) -> None:
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise node_error(error) from error

    async def aclose(self) -> None:
        """End it, whatever is on its way."""
        self._call.cancel()
        if self._sending is not None:
            await stop(self._sending, expected=(OffloadError,))


class PortStream(NodeStream):
    """A connection to a port, or a peer of one of UDP."""

    async def open(self, wish: PortOpen) -> None:
        """Say which port.

        Raises:
            OffloadError: the node is lost, or refuses.
        """
        await self._write(wish)
