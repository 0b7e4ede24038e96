"""Keeps a client's session alive that no daemon serves yet.

Inside a session the client is an HTTP/2 server, Go's own, which gives up when the preface has not
come within ten seconds and the first SETTINGS two seconds later. So both are sent at once by us;
when a daemon takes the session over, its own preface is left out, and its SETTINGS are further
ones, as HTTP/2 allows them at any time. The client's answer to ours reaches the daemon, which takes
no notice of it.
Source: golang.org/x/net/http2 server.go (prefaceTimeout, firstSettingsTimeout).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.messages import MessageReader, message_prefix, varint
from offload_proto.buildkit.control_pb2 import BytesMessage

if TYPE_CHECKING:
    from offload_builder.buildkit.h2.stream import Http2Stream

ANSWER = [(":status", "200"), ("content-type", "application/grpc")]


def wrapped(pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return bytes of a session as a message of the Session call."""
    size = sum(map(len, pieces))
    prefix = b"\x0a" + varint(size)
    return [message_prefix(len(prefix) + size), prefix, *pieces]


async def greet(client: Http2Stream) -> None:
    """Answer a client's Session call and begin the connection inside it.

    Raises:
        StreamResetError: the client has gone.
    """
    client.send_headers(ANSWER)
    await client.write(wrapped([frames.PREFACE + frames.settings_frame({})]))


async def pass_without_preface(daemon: Http2Stream, client: Http2Stream) -> None:
    """Pass on the beginning of what a daemon sends in a session, without its preface.

    Ends between two messages of the Session call, from where they can be passed on as they are.

    Raises:
        StreamResetError: one of the two broke off.
    """
    reader, begun, left = MessageReader(), b"", len(frames.PREFACE)
    while left or reader.partial:
        data = await daemon.read()
        if not data:
            return
        for message in reader.feed(data):
            begun += BytesMessage.FromString(message).data
        dropped = min(left, len(begun))
        left -= dropped
        begun = begun[dropped:]
        if begun:
            await client.write(wrapped([begun]))
            begun = b""
