"""Streams to the node of a session: connections to its engine and to its ports."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from offload_core.errors import NodeLostError
from offload_core.status import error_from_rpc
from offload_proto.v1.session_node_service_pb2 import Piece, PortRequest

if TYPE_CHECKING:
    from offload_core.errors import OffloadError

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
            call: a grpc.aio.StreamStreamCall of pieces.
            traffic: counts its bytes.
        """
        self._call = call
        self._traffic = traffic
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether it has come to its end, or broken."""
        return bool(self._call.done())

    def when_done(self, then: Any) -> None:
        """Call a function without arguments once it has ended."""
        self._call.add_done_callback(lambda _: then())

    def _message(self, piece: Piece) -> Any:
        return piece

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
        """Send bytes.

        Raises:
            OffloadError: the node is lost, or has ended it.
        """
        for at in range(0, len(data), PIECE_BYTES):
            part = data if len(data) <= PIECE_BYTES else data[at : at + PIECE_BYTES]
            await self._write(Piece(data=part))
            self._traffic.sent += len(part)

    async def half_close(self) -> None:
        """Say that no more comes; the other direction goes on.

        Raises:
            OffloadError: the node is lost, or has ended it.
        """
        await self._write(Piece(ended=True))

    async def _write(self, piece: Piece) -> None:
        try:
            await self._call.write(self._message(piece))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise node_error(error) from error

    async def aclose(self) -> None:
        """End it, whatever is on its way."""
        self._call.cancel()


class PortStream(NodeStream):
    """A connection to a port, or a peer of one of UDP."""

    def _message(self, piece: Piece) -> Any:
        return PortRequest(piece=piece)

    async def open(self, request: PortRequest) -> None:
        """Say which port.

        Raises:
            OffloadError: the node is lost, or refuses.
        """
        try:
            await self._call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise node_error(error) from error
