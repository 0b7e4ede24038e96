"""Connected TCP sockets whose bytes are carried on by streams of gRPC."""

from __future__ import annotations

import contextlib
import socket
import struct

PIECE_BYTES = 256 << 10
"""Bytes of one message; larger ones cost memory and gain nothing that could be measured."""
_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_EVERY, _KEEP_ALIVE_TRIES = 30, 10, 3


def keep_alive(connection: socket.socket) -> None:
    """Send small pieces at once, and notice within a minute that the other side is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEP_ALIVE_SECONDS),
        ("TCP_KEEPINTVL", _KEEP_ALIVE_EVERY),
        ("TCP_KEEPCNT", _KEEP_ALIVE_TRIES),
    ):
        # Systems name them differently; the default of two hours is better than none.
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees that something went wrong."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def wake(connection: socket.socket) -> None:
    """Let a pending read of this side come to its end; harmless when it is closed."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
