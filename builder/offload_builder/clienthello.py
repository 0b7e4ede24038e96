"""Reads the server name out of the beginning of a TLS connection, without taking part in it.

Sources: RFC 8446, sections 4.1.2 (ClientHello) and 5.1 (record layer); RFC 6066, section 3
(server_name); RFC 9849 (encrypted_client_hello). Everything comes from strangers: each length is
checked before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HELLO_BYTES = 1 << 16
"""Far above real hellos, which stay below 4 KiB even with post-quantum key shares."""

ALERT_UNRECOGNIZED_NAME = 112
ALERT_INTERNAL_ERROR = 80

_RECORD_HANDSHAKE = 22
_HANDSHAKE_CLIENT_HELLO = 1
_EXTENSION_SERVER_NAME = 0
_EXTENSION_ENCRYPTED_HELLO = 0xFE0D
_NAME_TYPE_HOST = 0
_MAX_RECORD = 1 << 14
_RECORD_HEADER = 5
_HANDSHAKE_HEADER = 4


class NotClientHelloError(ValueError):
    """The bytes are not the beginning of a TLS connection."""


@dataclass(frozen=True)
class ClientHello:
    """What a client says first."""

    server_name: str
    """Lower case; empty when the client names none."""
    hides_name: bool = False
    """It has an encrypted hello within, or bytes that look like one (ECH)."""


def parse_client_hello(data: bytes | bytearray | memoryview) -> ClientHello | int:
    """Return the hello at the beginning of a connection, or how many bytes it takes at least.

    Args:
        data: all bytes so far; more may follow the hello.

    Returns:
        The hello, or a length greater than that of `data` before which parsing again is useless.

    Raises:
        NotClientHelloError: this is not TLS, or broken, or larger than `MAX_HELLO_BYTES`.
    """
    view = memoryview(data)
    message = bytearray()
    offset = 0
    while True:
        wanted = _message_length(message)
        if wanted is not None and len(message) >= wanted:
            return _read_hello(memoryview(message)[_HANDSHAKE_HEADER:wanted])
        if len(view) - offset < _RECORD_HEADER:
            _check_start(view[offset:])
            return offset + _RECORD_HEADER
        length = _record_length(view[offset : offset + _RECORD_HEADER])
        end = offset + _RECORD_HEADER + length
        if end > MAX_HELLO_BYTES:
            raise NotClientHelloError("the hello is too large")
        if len(view) < end:
            return end
        message += view[offset + _RECORD_HEADER : end]
        offset = end


def alert(description: int) -> bytes:
    """Return a fatal TLS alert record (RFC 8446, section 6)."""
    return bytes((21, 3, 3, 0, 2, 2, description))


def _check_start(start: memoryview) -> None:
    """Refuse other protocols at their first byte; they may wait for an answer."""
    if len(start) > 0 and start[0] != _RECORD_HANDSHAKE:
        raise NotClientHelloError("not a TLS handshake")
    if len(start) > 1 and start[1] != 3:
        raise NotClientHelloError("not a TLS version")


def _record_length(header: memoryview) -> int:
    _check_start(header)
    length = int.from_bytes(header[3:5], "big")
    # RFC 8446, section 5.1: handshake fragments are never empty.
    if not 0 < length <= _MAX_RECORD:
        raise NotClientHelloError("a record has an impossible length")
    return length


def _message_length(message: bytearray) -> int | None:
    """Return the length of the whole handshake message, None while its header is incomplete."""
    if not message:
        return None
    if message[0] != _HANDSHAKE_CLIENT_HELLO:
        raise NotClientHelloError("the first message is not a ClientHello")
    if len(message) < _HANDSHAKE_HEADER:
        return None
    length = int.from_bytes(message[1:4], "big") + _HANDSHAKE_HEADER
    if length > MAX_HELLO_BYTES:
        raise NotClientHelloError("the hello is too large")
    return length


class _Reader:
    """Takes length-prefixed vectors from bytes that may lie about their lengths."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._offset = 0

    def take(self, count: int) -> memoryview:
        end = self._offset + count
        if end > len(self._data):
            raise NotClientHelloError("a length points behind the end")
        piece = self._data[self._offset : end]
        self._offset = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> memoryview:
        return self.take(self.number(length_size))

    def at_end(self) -> bool:
        return self._offset == len(self._data)


def _read_hello(body: memoryview) -> ClientHello:
    reader = _Reader(body)
    reader.take(2 + 32)  # legacy_version, random
    reader.vector(1)  # legacy_session_id
    reader.vector(2)  # cipher_suites
    reader.vector(1)  # legacy_compression_methods
    if reader.at_end():
        return ClientHello(
            ""
        )  # TLS 1.2 allows a hello without extensions (RFC 5246, section 7.4.1.2).
    extensions = _Reader(reader.vector(2))
    if not reader.at_end():
        raise NotClientHelloError("bytes follow the extensions")
    found: str | None = None
    hides_name = False
    while not extensions.at_end():
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == _EXTENSION_SERVER_NAME:
            if found is not None:
                raise NotClientHelloError("the server name is given twice")
            found = _host_name(content)
        hides_name = hides_name or kind == _EXTENSION_ENCRYPTED_HELLO
    return ClientHello(found or "", hides_name)


def _host_name(content: memoryview) -> str:
    reader = _Reader(content)
    names = _Reader(reader.vector(2))
    if not reader.at_end():
        raise NotClientHelloError("bytes follow the server names")
    host = ""
    while not names.at_end():
        kind, name = names.number(1), names.vector(2)
        if kind == _NAME_TYPE_HOST:
            if host or not name:
                raise NotClientHelloError("the server name is empty or given twice")
            try:
                host = bytes(name).decode("ascii").lower()
            except UnicodeDecodeError as error:
                raise NotClientHelloError("the server name is not ASCII") from error
    return host
