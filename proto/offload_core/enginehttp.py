"""The HTTP/1.1 that docker clients and docker engines speak: where heads and bodies end.

What reads requests on their way to an engine must see them exactly as the engine sees them, or
somebody hides one request in another. So only one form of each thing is taken: lines end with
CRLF, a body has one Content-Length or is chunked and not both, names of headers are tokens.
Everything else is refused before any byte of it has gone further.

Nothing here does input or output: whoever uses it gives a function that receives bytes.
`enginecalls.py` has calls of our own to an engine.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

MAX_HEAD = 65536
"""Bytes of a head; the engine itself takes as much for one header."""
_MAX_LINE = 4096
"""Bytes of a line between chunks."""
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_REQUEST = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([^ \r\n\t\0]+) (HTTP/1\.[01])")
_STATUS = re.compile(rb"(HTTP/1\.[01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
_VERSION = re.compile(r"\A/v[0-9.]+(?=/)")
_ORIGIN = re.compile(r"\A[A-Za-z][A-Za-z0-9+.\-]*://[^/?]*")


class _Headed:
    """What has headers."""

    headers: tuple[tuple[str, str], ...]

    def header(self, name: str) -> str:
        """Return the value of a header, empty when it is not there."""
        name = name.lower()
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def upgrades(self) -> bool:
        """Whether the connection is no longer HTTP after this, if the other side agrees.

        An engine that refuses answers with an error and reads the next request. Who lets pass what
        follows unread must have seen the answer 101.
        """
        return bool(self.header("Upgrade")) and "upgrade" in self.header("Connection").lower()


@dataclass(frozen=True)
class RequestHead(_Headed):
    """The head of a request.

    Attributes:
        method: as sent.
        target: as sent, for example "/v1.47/containers/create?name=x".
        version: "HTTP/1.1" or "HTTP/1.0".
        headers: names and values in their order.
        raw: all of it with the empty line at its end.
    """

    method: str
    target: str
    version: str
    headers: tuple[tuple[str, str], ...]
    raw: bytes

    @cached_property
    def path(self) -> str:
        """What is asked for, as the engine finds it: decoded, without its version and query."""
        path = unquote(_ORIGIN.sub("", self.target, count=1).partition("?")[0], "latin-1")
        return _VERSION.sub("", path, count=1)

    @cached_property
    def query(self) -> dict[str, list[str]]:
        """The values of the query by their names."""
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)

    @property
    def stays(self) -> bool:
        """Whether the client wants the connection for further requests."""
        wishes = {wish.strip().lower() for wish in self.header("Connection").split(",")}
        return "close" not in wishes and (self.version == "HTTP/1.1" or "keep-alive" in wishes)

    def replaced(
        self,
        *,
        target: str | None = None,
        body_length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return the bytes of this head with something else in it.

        Args:
            target: instead of its own.
            body_length: of a body that is sent instead of its own, whole.
            headers: instead of those with the same names; those that are empty are left out.
        """
        other = {name.lower(): (name, value) for name, value in (headers or {}).items()}
        if body_length is not None:
            for name in ("transfer-encoding", "expect", "trailer"):
                other[name] = name, ""
            other["content-length"] = "Content-Length", str(body_length)
        kept = [(name, value) for name, value in self.headers if name.lower() not in other]
        added = [(name, value) for name, value in other.values() if value]
        lines = [f"{self.method} {target or self.target} {self.version}"]
        lines += [f"{name}: {value}" for name, value in kept + added]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass(frozen=True)
class ResponseHead(_Headed):
    """The head of a response.

    Attributes:
        status: for example 200.
        headers: names and values in their order.
        raw: all of it with the empty line at its end.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    raw: bytes


class _Body:
    """Finds the end of a body in blocks of bytes; keeps none of them."""

    def __init__(self, length: int | None) -> None:
        """Start before its first byte.

        Args:
            length: bytes; None when it is chunked.
        """
        self.chunked = length is None
        self._left = length or 0
        self._line = bytearray()
        self._part = "size" if self.chunked else "data"
        self._trailer = 0
        self.finished = length == 0

    def feed(self, block: bytes, into: bytearray | None = None) -> int:
        """Return how many bytes of a block belong to the body.

        Args:
            block: the next bytes.
            into: gets those that are content and not framing.

        Raises:
            UsageError: the framing is wrong.
        """
        at = 0
        while at < len(block) and not self.finished:
            if self._part == "data":
                take = min(self._left, len(block) - at)
                if into is not None:
                    into += memoryview(block)[at : at + take]
                at += take
                self._left -= take
                if self._left == 0:
                    self._part = "data end"
                    self.finished = not self.chunked
                    if self.chunked:
                        at = self._feed_next_size(block, at)
            else:
                at = self._feed_line(block, at)
        return at

    def _feed_next_size(self, block: bytes, at: int) -> int:
        """Take the line between two chunks in one go, where the block has all of it.

        Copies have thousands of chunks in a second.
        """
        end = block.find(b"\r\n", at + 2, at + 2 + _MAX_LINE)
        if end < 0 or not block.startswith(b"\r\n", at):
            return at
        match = _CHUNK.fullmatch(block, at + 2, end)
        size = int(match[1], 16) if match else 0
        if not size:
            return at
        self._left = size
        self._part = "data"
        return end + 2

    def _feed_line(self, block: bytes, at: int) -> int:
        end = block.find(b"\n", at)
        stop = len(block) if end < 0 else end + 1
        self._line += memoryview(block)[at:stop]
        if len(self._line) > _MAX_LINE:
            raise UsageError("a chunk of an HTTP body has a head that is too long")
        if end < 0:
            return stop
        line = bytes(self._line)
        self._line.clear()
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise UsageError("an HTTP body has wrong line ends")
        self._take_line(line[:-2])
        return stop

    def _take_line(self, line: bytes) -> None:
        if self._part == "size":
            match = _CHUNK.fullmatch(line)
            if match is None:
                raise UsageError("a chunk of an HTTP body has no size")
            self._left = int(match[1], 16)
            self._part = "data" if self._left else "trailer"
        elif self._part == "data end":
            if line:
                raise UsageError("a chunk of an HTTP body is longer than its size")
            self._part = "size"
        elif line:
            self._trailer += len(line)
            if self._trailer > MAX_HEAD or not _HEADER.fullmatch(line):
                raise UsageError("an HTTP body has a wrong trailer")
        else:
            self.finished = True


class _Reader:
    """Heads and bodies of one direction of a connection."""

    def __init__(self, receive: Callable[[], Awaitable[bytes]]) -> None:
        """Start before the first head.

        Args:
            receive: returns the next bytes; none at the end.
        """
        self._receive = receive
        self._ahead = b""
        self._body = _Body(0)
        self._until_end = False

    def rest(self) -> bytes:
        """Return what has been received and not been read, once."""
        rest, self._ahead = self._ahead, b""
        return rest

    async def body(self) -> AsyncGenerator[bytes, None]:
        """Return the bytes of the body as they come, with their framing.

        Raises:
            UsageError: the framing is wrong, or it ends early.
        """
        while (block := await self._next(None)) is not None:
            if block:
                yield block

    async def content(self) -> AsyncGenerator[bytes, None]:
        """Return the bytes of the body as they come, without their framing.

        Raises:
            UsageError: the framing is wrong, or it ends early.
        """
        while True:
            content = bytearray()
            if await self._next(content) is None:
                return
            if content:
                yield bytes(content)

    async def read_body(self, limit: int) -> bytes:
        """Return the whole body without its framing.

        Raises:
            UsageError: it has more than `limit` bytes, its framing is wrong, or it ends early.
        """
        content = bytearray()
        while await self._next(content) is not None:
            if len(content) > limit:
                raise UsageError(f"a message to or from the engine has more than {limit} bytes")
        return bytes(content)

    async def _next(self, into: bytearray | None) -> bytes | None:
        """Read a block of the body; None after its end."""
        if self._until_end:
            block = self.rest() or await self._receive()
            if into is not None:
                into += block
            return block or None
        if self._body.finished:
            return None
        block = self.rest() or await self._receive()
        if not block:
            raise UsageError("the connection ended in the middle of an HTTP body")
        used = self._body.feed(block, into)
        if used == len(block):
            return block
        self._ahead = block[used:]
        return block[:used]

    async def _head(self) -> tuple[bytes, bytes, tuple[tuple[str, str], ...]] | None:
        """Return first line, raw head and headers of the next head; None at a clean end."""
        async for _ in self.body():
            """What nobody wanted of the body before."""
        if self._until_end:
            return None
        data = bytearray(self.rest())
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD:
                raise UsageError(f"an HTTP head has more than {MAX_HEAD} bytes")
            block = await self._receive()
            if not block and not data:
                return None
            if not block:
                raise UsageError("the connection ended in the middle of an HTTP head")
            data += block
        end += 4
        if end > MAX_HEAD:
            raise UsageError(f"an HTTP head has more than {MAX_HEAD} bytes")
        self._ahead = bytes(data[end:])
        raw = bytes(data[:end])
        first, *lines = raw[:-4].split(b"\r\n")
        headers = []
        for line in lines:
            match = _HEADER.fullmatch(line)
            if match is None:
                raise UsageError("an HTTP head has a line that is no header")
            headers.append((match[1].decode("ascii"), match[2].decode("latin-1")))
        return first, raw, tuple(headers)


def _find_body(headers: tuple[tuple[str, str], ...]) -> _Body | None:
    """Return the body that headers announce; None when they say nothing of one."""
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    codings = [value for name, value in headers if name.lower() == "transfer-encoding"]
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != "chunked":
            raise UsageError("an HTTP head says in more than one way where its body ends")
        return _Body(None)
    if not lengths:
        return None
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0], re.ASCII):
        raise UsageError("an HTTP head has a wrong Content-Length")
    return _Body(int(lengths[0]))


class RequestReader(_Reader):
    """Reads requests, one after the other: a head, then its body.

    What is left of a body when the next head is wanted is dropped. After an upgrade `rest` and what
    is received then go on without this.
    """

    async def head(self) -> RequestHead | None:
        """Return the head of the next request; None at a clean end.

        Raises:
            UsageError: what comes is no HTTP as we take it, or too long.
        """
        read = await self._head()
        if read is None:
            return None
        first, raw, headers = read
        match = _REQUEST.fullmatch(first)
        if match is None:
            raise UsageError("the connection to the engine carries no HTTP/1.1 request")
        self._body = _find_body(headers) or _Body(0)
        if self._body.chunked and match[3] != b"HTTP/1.1":
            raise UsageError("an HTTP/1.0 request has a chunked body")
        method, target, version = (part.decode("latin-1") for part in match.groups())
        return RequestHead(method, target, version, headers, raw)


class ResponseReader(_Reader):
    """Reads responses, one after the other: a head, then its body."""

    async def head(self, method: str = "GET") -> ResponseHead:
        """Return the head of the response to a request.

        Args:
            method: of the request; a response to HEAD has no body.

        Raises:
            UsageError: what comes is no HTTP as we take it, or the connection ended before.
        """
        while True:
            read = await self._head()
            match = _STATUS.fullmatch(read[0]) if read is not None else None
            if read is None or match is None:
                raise UsageError("the connection ended where an HTTP response should be")
            _, raw, headers = read
            status = int(match[2])
            # After 101 nothing is HTTP; the other ones of this kind come before the real response.
            if status >= HTTPStatus.OK or status == HTTPStatus.SWITCHING_PROTOCOLS:
                break
        body = _find_body(headers)
        bodiless = status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED) or status < 200
        if bodiless or method == "HEAD":
            body = _Body(0)
        self._until_end = body is None
        self._body = body or _Body(0)
        return ResponseHead(status, headers, raw)


def response(
    status: int,
    body: bytes,
    content_type: str = "application/json",
    *,
    headers: Mapping[str, str] | None = None,
    close: bool = False,
) -> bytes:
    """Return a response.

    Args:
        status: for example 200.
        body: all of it.
        content_type: of the body.
        headers: more of them.
        close: the connection ends after it.
    """
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    lines = [f"HTTP/1.1 {status} {phrase}"]
    if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    else:
        body = b""
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def error_response(status: int, message: str, *, close: bool = False) -> bytes:
    """Return a response with an error in the form of docker's."""
    return response(status, json.dumps({"message": message}).encode() + b"\n", close=close)
