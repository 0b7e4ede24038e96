"""One call on its way from a client's connection to a daemon's, and the answer on its way back.

Each of the two connections has its own stream numbers, header compression and flow control. DATA
frames go from one connection's receiver right into the other's queue, see `Http2Stream.pass_on`;
what the slower side does not take stays within the windows that the faster side was given.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2.messages import GrpcError, message_prefix, status_of
from offload_builder.buildkit.h2.stream import StreamResetError
from offload_builder.buildkit.stepgroups import TRACE_HEADERS, trace_headers
from offload_core.aio import stop

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from offload_builder.buildkit.h2.connection import Http2Connection
    from offload_builder.buildkit.h2.headers import HeaderList
    from offload_builder.buildkit.h2.stream import Http2Stream

_HOP_HEADERS = frozenset(("connection", "keep-alive", "transfer-encoding", "upgrade", "host"))


def forwarded(headers: HeaderList, trace: str = "") -> HeaderList:
    """Return the request headers of a client as the daemon gets them.

    Args:
        headers: of the client.
        trace: takes the place of the client's own, see `stepgroups`; empty to leave that.
    """
    dropped = TRACE_HEADERS if trace else frozenset[str]()
    kept = [
        (name, value)
        for name, value in headers
        if name not in _HOP_HEADERS | dropped and name not in (":scheme", ":authority")
    ]
    kept += trace_headers(trace)
    # RFC 9113, section 8.3: pseudo-header fields come first.
    return [(":scheme", "http"), (":authority", "localhost"), *_sorted(kept)]


def _sorted(headers: Iterable[tuple[str, str]]) -> HeaderList:
    return sorted(headers, key=lambda item: not item[0].startswith(":"))


@contextmanager
def daemon_stream(
    connection: Http2Connection, headers: HeaderList, trace: str = ""
) -> Iterator[Http2Stream]:
    """Begin the call with a client's headers at a daemon; what is left of it at the end is reset.

    The arguments are those of `forwarded`.

    Raises:
        StreamResetError: the connection is gone, or has too many calls.
    """
    stream = connection.open_stream(forwarded(headers, trace))
    try:
        yield stream
    finally:
        stream.reset()


async def relay_in_session(
    daemon: Http2Stream, client: Http2Connection, request: bytes | None
) -> None:
    """Pass a call of the daemon on to a client, inside a session.

    Args:
        daemon: the daemon's stream.
        client: the connection inside the client's session.
        request: the only message of the call, when it was read already.

    Raises:
        StreamResetError: one of the two ended it early.
    """
    stream = client.open_stream(daemon.headers)
    try:
        if request is not None:
            await stream.write([message_prefix(len(request)), request])
            stream.end()
        await relay(daemon, stream, request=request is None)
    finally:
        stream.reset()


async def relay(
    client: Http2Stream, daemon: Http2Stream, *, request: bool = True, answered: bool = False
) -> None:
    """Move a call in both directions until the daemon has ended it.

    Args:
        client: the client's stream; it is ended with the daemon's status.
        daemon: the daemon's stream for the same call.
        request: False when the request was sent already.
        answered: the client has the first header block of an answer already.

    Raises:
        StreamResetError: one of the two ended it early.
    """
    upward = asyncio.ensure_future(_requests(client, daemon)) if request else None
    try:
        await _answers(client, daemon, answered=answered)
    finally:
        if upward is not None:
            await stop(upward, expected=(StreamResetError,))


async def _requests(client: Http2Stream, daemon: Http2Stream) -> None:
    await client.pass_on(daemon)
    daemon.end()


async def _answers(client: Http2Stream, daemon: Http2Stream, *, answered: bool) -> None:
    headers = await daemon.wait_headers()
    if any(name == "grpc-status" for name, _ in headers):
        client.end([item for item in headers if not answered or item[0].startswith("grpc-")])
        return
    if not answered:
        client.send_headers(headers)
    await daemon.pass_on(client)
    client.end(daemon.trailers)


async def answer_of(daemon: Http2Stream) -> tuple[bytes, GrpcError | None]:
    """Return the bytes of an answer and the error it ended with, None for OK.

    Raises:
        StreamResetError: the daemon went away.
    """
    pieces = []
    while data := await daemon.read():
        pieces.append(data)
    await daemon.wait_headers()
    return b"".join(pieces), status_of(daemon.trailers or daemon.headers)
