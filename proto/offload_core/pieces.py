"""Pieces of byte streams as messages of gRPC, with nothing in between that copies them.

The library of protobuf copies the bytes of a message twice, at both ends, and takes memory for each
copy; that was a third of all that a stream cost. A piece is hardly more than its bytes: a tag, a
length, and what is carried. Everything else is left to the library.
"""

from __future__ import annotations

from typing import NamedTuple

from offload_proto.v1.session_node_service_pb2 import Piece, PortOpen, PortRequest

_DATA = 0x0A
"""Field 1 of Piece, its length follows. Source: protobuf.dev, "Encoding"."""
_PIECE = 0x12
"""Field 2 of PortRequest, as well."""


class StreamPiece(NamedTuple):
    """A `Piece`.

    Attributes:
        data: bytes of the stream.
        ended: nothing more comes in this direction.
        more: bytes that follow `data`, of a piece to be written; joined once only.
    """

    data: bytes = b""
    ended: bool = False
    more: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """How many bytes it carries."""
        return sum(map(len, self.more), len(self.data))


def write_piece(piece: StreamPiece) -> bytes:
    """Return the message `Piece`."""
    if piece.ended:
        return Piece(data=piece.data, ended=True).SerializeToString()
    return b"".join((_head(_DATA, piece.size), piece.data, *piece.more))


def read_piece(message: bytes) -> StreamPiece:
    """Return what is in a message `Piece`; raises DecodeError when it is none."""
    start = _start(message, 0, _DATA)
    if start is not None:
        return StreamPiece(message[start:])
    piece = Piece.FromString(message)
    return StreamPiece(piece.data, piece.ended)


def write_port_request(request: PortOpen | StreamPiece) -> bytes:
    """Return the message `PortRequest`."""
    if isinstance(request, PortOpen):
        return PortRequest(open=request).SerializeToString()
    if request.ended:
        piece = Piece(data=request.data, ended=True)
        return PortRequest(piece=piece).SerializeToString()
    inner = _head(_DATA, request.size)
    outer = _head(_PIECE, len(inner) + request.size)
    return b"".join((outer, inner, request.data, *request.more))


def read_port_request(message: bytes) -> PortOpen | StreamPiece | None:
    """Return what is in a message `PortRequest`: None for nothing.

    Raises DecodeError when it is no such message.
    """
    inner = _start(message, 0, _PIECE)
    start = _start(message, inner, _DATA) if inner is not None else None
    if start is not None:
        return StreamPiece(message[start:])
    request = PortRequest.FromString(message)
    if request.HasField("open"):
        return request.open
    if request.HasField("piece"):
        return StreamPiece(request.piece.data, request.piece.ended)
    return None


def _head(tag: int, length: int) -> bytes:
    """Return a tag and a length, seven bits to a byte."""
    head = bytearray((tag,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


def _start(message: bytes, at: int, tag: int) -> int | None:
    """Return where the content of a field begins; None unless it is all that follows."""
    end = len(message)
    if at >= end or message[at] != tag:
        return None
    length, shift = 0, 0
    while shift < 35 and (at := at + 1) < end:
        length |= (message[at] & 0x7F) << shift
        shift += 7
        if message[at] < 0x80:
            return at + 1 if at + 1 + length == end else None
    return None
