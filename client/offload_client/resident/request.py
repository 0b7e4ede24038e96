"""Reading what a command hands over; see `thin` for the wire format."""

from __future__ import annotations

import array
import asyncio
import socket
import struct
from pathlib import Path

from offload_client.invocation import Invocation, text_stream

MAX_REQUEST_BYTES = 8 << 20
"""Above the largest argument list and environment that Linux gives a program (6 MiB)."""
_LENGTH_BYTES = 4
_DESCRIPTORS = 3
_PATH_VARIABLES = frozenset((
    "DOCKER_CERT_PATH", "DOCKER_CONFIG", "HOME", "OFFLOAD_BUILDX", "TMPDIR", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
))  # fmt: skip
"""A relative path in these is relative to where the command was started, not the helper."""


async def read_request(connection: socket.socket, descriptors: list[int]) -> Invocation:
    """Return the command that a connection brings.

    Args:
        connection: non-blocking.
        descriptors: takes what was received, also in case of an error; the caller closes them.

    Raises:
        ValueError: no command of ours.
        OSError: the connection broke.
    """
    head = await _receive_head(connection, descriptors)
    length = int.from_bytes(head, "big")
    if length > MAX_REQUEST_BYTES:
        raise ValueError("the request is too long")
    return _invocation(await _receive(connection, length), descriptors)


def peer_uid(connection: socket.socket) -> int:
    """Return the user at the other end of a unix socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", data)[1]
    return uid


def _invocation(payload: bytes, descriptors: list[int]) -> Invocation:
    fields = payload.decode("utf-8", "surrogateescape").split("\0")
    if len(descriptors) != _DESCRIPTORS or len(fields) < 2:
        raise ValueError("three descriptors and a command are expected")
    count = int(fields[1])
    cwd = Path(fields[0])
    environment = dict(field.split("=", 1) for field in fields[2 + count :] if "=" in field)
    for name in _PATH_VARIABLES & environment.keys():
        # A word without "/" may name a program in PATH.
        if "/" in environment[name] or (environment[name] and name != "OFFLOAD_BUILDX"):
            environment[name] = str(cwd / environment[name])
    return Invocation(
        arguments=fields[2 : 2 + count],
        cwd=cwd,
        environment=environment,
        stdin=descriptors[0],
        stdout=text_stream(descriptors[1]),
        stderr=text_stream(descriptors[2]),
        resident=True,
    )


async def _receive_head(connection: socket.socket, descriptors: list[int]) -> bytes:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
    size = array.array("i").itemsize
    head, ancillary, _, _ = connection.recvmsg(
        _LENGTH_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * size), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % size])
            descriptors.extend(received)
    return head + await _receive(connection, _LENGTH_BYTES - len(head))


async def _receive(connection: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < length:
        part = await loop.sock_recv(connection, min(1 << 16, length - len(data)))
        if not part:
            raise ValueError("the request is cut off")
        data += part
    return bytes(data)
