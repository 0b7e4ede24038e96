"""gRPC over HTTP/2: message framing, status trailers, metadata.

Source: the gRPC project's "gRPC over HTTP2" protocol description.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.buildkit.h2.headers import HeaderList

MAX_MESSAGE = 16 * 2**20
"""Bytes of one message; BuildKit's limit in both directions."""

# Codes of google.rpc.Code.
OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14

_PREFIX = struct.Struct(">BI")
_UNESCAPED = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
# Longer texts would not fit into the default header limit of some peers.
_MAX_STATUS_TEXT = 4000


class GrpcError(Exception):
    """A call ended with a status that is not OK."""

    def __init__(self, code: int, message: str, details: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
        """A serialised google.rpc.Status, or nothing."""


def message_prefix(size: int) -> bytes:
    """Return the 5 bytes before a message of `size` bytes."""
    return _PREFIX.pack(0, size)


def varint(value: int) -> bytes:
    """Return a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class MessageReader:
    """Cuts a byte stream into messages.

    The pieces of an unfinished message are collected, so that a large one costs one copy.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = _PREFIX.size

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that end in `data`.

        Raises:
            GrpcError: a message is too large or compressed.
        """
        self._pieces.append(data)
        self._have += len(data)
        if self._have < self._need:
            return []
        buffer = data if len(self._pieces) == 1 else b"".join(self._pieces)
        messages: list[bytes] = []
        position, size = 0, len(buffer)
        while size - position >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(buffer, position)
            if compressed:
                raise GrpcError(UNIMPLEMENTED, "compressed messages are not supported")
            if length > MAX_MESSAGE:
                raise GrpcError(RESOURCE_EXHAUSTED, f"message of {length} bytes is too large")
            end = position + _PREFIX.size + length
            if end > size:
                break
            messages.append(buffer[position + _PREFIX.size : end])
            position = end
        rest = buffer[position:]
        self._have = len(rest)
        self._pieces = [rest] if rest else []
        self._need = _PREFIX.size
        if self._have >= _PREFIX.size:
            self._need += _PREFIX.unpack_from(rest)[1]
        return messages

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._have > 0


def status_trailers(code: int, message: str, details: bytes = b"") -> HeaderList:
    """Return the trailers that end a call."""
    trailers = [("grpc-status", str(code))]
    if message:
        text = message.encode("utf-8", "replace")[:_MAX_STATUS_TEXT]
        trailers.append(("grpc-message", quote(text, safe=_UNESCAPED)))
    if details:
        encoded = base64.b64encode(details).rstrip(b"=").decode()
        trailers.append(("grpc-status-details-bin", encoded))
    return trailers


def status_of(trailers: Iterable[tuple[str, str]]) -> GrpcError | None:
    """Return the error that trailers carry, or None for OK."""
    fields = dict(trailers)
    text = fields.get("grpc-status")
    if text is None:
        http = fields.get(":status", "")
        return GrpcError(UNKNOWN, f"the call ended without a status (HTTP {http or 'unknown'})")
    try:
        code = int(text)
    except ValueError:
        code = UNKNOWN
    if code == OK:
        return None
    return GrpcError(
        code,
        unquote(fields.get("grpc-message", ""), errors="replace"),
        decode_binary(fields.get("grpc-status-details-bin", "")),
    )


def decode_binary(value: str) -> bytes:
    """Return the bytes of a "-bin" header, padded or not; nothing if it is broken."""
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        return b""
