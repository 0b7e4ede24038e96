"""Room for bytes on their way."""

from __future__ import annotations

from offload_builder.node.sessions.room import MAX_PIECE, MIN_PIECE, Room


def test_pieces_are_small_where_little_is_left_and_never_too_small() -> None:
    room = Room(64 << 20)
    assert room.piece() == MAX_PIECE
    room.take(60 << 20)
    assert MIN_PIECE < room.piece() < MAX_PIECE
    room.take(60 << 20)
    assert room.piece() == MIN_PIECE
    room.take(-120 << 20)
    assert room.piece() == MAX_PIECE


def test_a_room_is_a_part_of_the_one_around_it() -> None:
    node = Room(64 << 20)
    one, other = Room(64 << 20, node), Room(64 << 20, node)
    one.take(64 << 20)
    assert (node.held, other.held) == (64 << 20, 0)
    assert other.piece() == MIN_PIECE
    one.take(-64 << 20)
    assert other.piece() == MAX_PIECE
