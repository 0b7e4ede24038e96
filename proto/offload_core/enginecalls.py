"""Calls of our own to a docker engine, over any connection that carries its API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from offload_core.enginehttp import ResponseHead, ResponseReader
from offload_core.errors import NodeLostError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

MAX_REPLY = 16 << 20
"""Bytes of the body of a reply that is read whole."""
CALL_SECONDS = 30.0
_READ = 1 << 16
_NO_JSON = (ValueError, RecursionError)
"""An engine is in the hands of its member, who may have it say anything."""


class EngineConnection(Protocol):
    """One connection to the API of an engine."""

    async def receive(self) -> bytes:
        """Return the next bytes; none at the end."""

    async def send(self, data: bytes) -> None:
        """Send bytes."""

    async def aclose(self) -> None:
        """End the connection."""


@dataclass(frozen=True, slots=True)
class EngineReply:
    """What an engine answered.

    Attributes:
        status: of HTTP.
        headers: names and values.
        body: all of it.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def json(self) -> Any:
        """Return what the body means.

        Raises:
            UsageError: it is no JSON.
        """
        try:
            return json.loads(self.body)
        except _NO_JSON as error:
            raise UsageError("the engine's reply is no JSON") from error

    @property
    def message(self) -> str:
        """The engine's sentence on an error; empty when it says none."""
        try:
            told = json.loads(self.body)
        except _NO_JSON:
            return ""
        return str(told.get("message", "")) if isinstance(told, dict) else ""


class UnixConnection:
    """A connection to an engine's unix socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path | str) -> Self:
        """Connect.

        Raises:
            NodeLostError: nobody listens.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=_READ)
        except OSError as error:
            raise NodeLostError(f"the docker engine does not answer: {error.strerror}") from error
        return cls(reader, writer)

    async def receive(self) -> bytes:
        """Return the next bytes; none at the end."""
        try:
            return await self._reader.read(_READ)
        except OSError as error:
            raise NodeLostError(f"the docker engine hung up: {error.strerror}") from error

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise NodeLostError(f"the docker engine hung up: {error.strerror}") from error

    async def aclose(self) -> None:
        """End the connection."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def request(
    method: str,
    target: str,
    body: bytes = b"",
    *,
    content_type: str = "application/json",
    close: bool = False,
) -> bytes:
    """Return a request of our own.

    Args:
        method: for example "GET".
        target: for example "/containers/json", in the engine's newest version of its API.
        body: all of it.
        content_type: of the body.
        close: the engine ends the connection after its response.
    """
    lines = [f"{method} {target} HTTP/1.1", "Host: docker"]
    if body:
        lines.append(f"Content-Type: {content_type}")
    if body or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


async def exchange(
    connection: EngineConnection,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    limit: int = MAX_REPLY,
) -> EngineReply:
    """Send a request on a connection that waits for one, and read its reply; no time limit.

    Raises:
        UsageError: the reply is too long, or none.
        OffloadError: the connection ends.
    """
    await connection.send(request(method, target, body))
    reader = ResponseReader(connection.receive)
    head = await reader.head(method)
    return EngineReply(head.status, head.headers, await reader.read_body(limit))


async def call_engine(
    connect: Callable[[], Awaitable[EngineConnection]],
    method: str,
    target: str,
    body: bytes = b"",
    *,
    timeout: float = CALL_SECONDS,
    limit: int = MAX_REPLY,
) -> EngineReply:
    """Send a request on a connection of its own, and read its reply.

    Args:
        connect: opens a connection to the engine.
        method: for example "GET".
        target: for example "/containers/json".
        body: JSON.
        timeout: seconds for everything.
        limit: bytes of the reply's body.

    Raises:
        NodeLostError: the engine does not answer in time.
        OffloadError: it cannot be reached, or its reply is too long.
    """
    try:
        async with asyncio.timeout(timeout):
            connection = await connect()
            try:
                return await exchange(connection, method, target, body, limit=limit)
            finally:
                await connection.aclose()
    except TimeoutError as error:
        raise NodeLostError(
            f"the docker engine did not answer {method} {target} in {timeout:g} s"
        ) from error


@asynccontextmanager
async def stream_engine(
    connect: Callable[[], Awaitable[EngineConnection]],
    target: str,
    *,
    timeout: float = CALL_SECONDS,
) -> AsyncIterator[AsyncIterator[bytes]]:
    """GET something that does not end, for example "/events"; yields the pieces of its content.

    Args:
        connect: opens a connection to the engine.
        target: what is asked for.
        timeout: seconds until the response begins.

    Raises:
        NodeLostError: the engine does not answer in time.
        OffloadError: it cannot be reached, or answers with an error.
    """
    try:
        async with asyncio.timeout(timeout):
            connection = await connect()
    except TimeoutError as error:
        raise NodeLostError("the docker engine cannot be reached in time") from error
    try:
        reader = ResponseReader(connection.receive)
        head: ResponseHead
        try:
            async with asyncio.timeout(timeout):
                await connection.send(request("GET", target))
                head = await reader.head()
        except TimeoutError as error:
            raise NodeLostError(f"the docker engine did not answer GET {target}") from error
        if head.status != 200:
            told = EngineReply(head.status, head.headers, await reader.read_body(MAX_REPLY))
            raise NodeLostError(f"the docker engine refuses {target}: {told.message}")
        async with aclosing(reader.content()) as pieces:
            yield pieces
    finally:
        await connection.aclose()


async def json_lines(pieces: AsyncIterator[bytes], *, limit: int = 1 << 20) -> AsyncIterator[Any]:
    """Return the JSON values of a stream that has one per line.

    Raises:
        OffloadError: a line has more than `limit` bytes or is no JSON, or the stream breaks.
    """
    ahead = b""
    async for piece in pieces:
        *lines, ahead = (ahead + piece).split(b"\n")
        if len(ahead) > limit:
            raise UsageError(f"a line from the docker engine has more than {limit} bytes")
        for line in lines:
            if line.strip():
                try:
                    value = json.loads(line)
                except _NO_JSON as error:
                    raise UsageError("a line from the docker engine is no JSON") from error
                yield value
