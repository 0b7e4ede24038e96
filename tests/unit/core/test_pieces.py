"""Pieces without protobuf are the messages that protobuf knows."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from offload_core.pieces import (
    StreamPiece,
    read_piece,
    read_port_request,
    write_piece,
    write_port_request,
)
from offload_proto.v1.session_node_service_pb2 import Piece, PortOpen, PortRequest

LENGTHS = (0, 1, 5, 0x7F, 0x80, 0x3FFF, 0x4000, 1 << 20)
PIECES = [StreamPiece(b"\x0a" * length, ended) for length in LENGTHS for ended in (False, True)]


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: f"{len(piece.data)}-{piece.ended}")
def test_pieces_are_read_and_written_as_by_protobuf(piece: StreamPiece) -> None:
    message = Piece(data=piece.data, ended=piece.ended)
    assert Piece.FromString(write_piece(piece)) == message
    assert read_piece(message.SerializeToString()) == piece
    assert read_piece(write_piece(piece)) == piece
    request = PortRequest(piece=message)
    assert PortRequest.FromString(write_port_request(piece)) == request
    assert read_port_request(request.SerializeToString()) == piece
    assert read_port_request(write_port_request(piece)) == piece


def test_a_wish_for_a_port_is_read_and_written_as_by_protobuf() -> None:
    wish = PortOpen(port=80, host="::1")
    assert PortRequest.FromString(write_port_request(wish)) == PortRequest(open=wish)
    assert read_port_request(write_port_request(wish)) == wish
    assert read_port_request(b"") is None


@pytest.mark.parametrize(
    "message",
    [b"\x0a", b"\x0a\x05abc", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\xff"],
)
def test_what_is_no_message_is_an_error(message: bytes) -> None:
    with pytest.raises(DecodeError):
        read_piece(message)


def test_the_last_of_two_fields_holds() -> None:
    assert read_piece(b"\x0a\x01a\x0a\x01b") == StreamPiece(b"b")


def test_parts_of_a_piece_are_one_piece_on_the_way() -> None:
    parts = StreamPiece(b"ab", more=(b"", b"c" * 200, b"d"))
    assert parts.size == 203
    assert read_piece(write_piece(parts)) == StreamPiece(b"ab" + b"c" * 200 + b"d")
    assert read_port_request(write_port_request(parts)) == read_piece(write_piece(parts))
