"""The little of HTTP/1.1 that an engine's registry client speaks, over asyncio streams.

Source: RFC 9112 (message syntax), RFC 9110 sections 11.6 (authentication) and 14 (ranges).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Mapping
    from http import HTTPStatus

_HEAD_LIMIT_BYTES = 32 << 10
_IDLE_SECONDS = 120.0
_WRITE_SECONDS = 300.0
_TLS_HANDSHAKE = 0x16
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class BadRequestError(Exception):
    """Not a request that this server understands; answered with 400."""


@dataclass(frozen=True)
class Request:
    """A request without a body."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""

    @property
    def keep_alive(self) -> bool:
        """Whether the peer wants to use the connection again."""
        return "close" not in self.headers.get("connection", "").lower()

    def range_start(self, size_bytes: int) -> int | None:
        """Return the first byte that a `Range: bytes=N-` header asks for, None for no range.

        Raises:
            BadRequestError: the range begins after the end.
        """
        match = _RANGE.fullmatch(self.headers.get("range", "").strip())
        if match is None or (match[2] and int(match[2]) != size_bytes - 1):
            # RFC 9110, 14.2: a server may ignore a range and send everything.
            return None
        start = int(match[1])
        if start >= size_bytes:
            raise BadRequestError("range")
        return start


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Read a request's head; None at the end of the connection or after two idle minutes.

    Raises:
        BadRequestError: TLS, which every engine tries first on a loopback registry, or no HTTP.
    """
    try:
        async with asyncio.timeout(_IDLE_SECONDS):
            first = await reader.readexactly(1)
            if first[0] == _TLS_HANDSHAKE:
                raise BadRequestError("TLS")
            head = first + await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, TimeoutError, ConnectionError):
        return None
    except asyncio.LimitOverrunError as error:
        raise BadRequestError("head too long") from error
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequestError("request line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise BadRequestError("body")
    return Request(parts[0], parts[1].partition("?")[0], headers)


async def write_response(
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    headers: Mapping[str, str],
    body: bytes = b"",
) -> None:
    """Write a whole response; Content-Length is added unless the headers have it."""
    await _write(writer, _head(status, {"Content-Length": str(len(body)), **headers}) + body)


async def write_stream(
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    headers: Mapping[str, str],
    content: AsyncIterable[bytes],
) -> None:
    """Write a response whose body is streamed; the headers must tell its length."""
    await _write(writer, _head(status, headers))
    async for piece in content:
        await _write(writer, piece)


def stream_limit() -> int:
    """Return the longest request head in bytes, for asyncio's stream reader."""
    return _HEAD_LIMIT_BYTES


def _head(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    async with asyncio.timeout(_WRITE_SECONDS):
        await writer.drain()
