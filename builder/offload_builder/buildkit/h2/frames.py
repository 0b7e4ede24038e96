"""HTTP/2 frames: numbers of RFC 9113, encoding, and cutting a byte stream into frames."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Frame types, RFC 9113 section 6.
DATA = 0x0
HEADERS = 0x1
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

# Flags.
END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FIELDS = 0x20

# Settings, section 6.5.2.
SETTINGS_HEADER_TABLE_SIZE = 0x1
SETTINGS_ENABLE_PUSH = 0x2
SETTINGS_MAX_CONCURRENT_STREAMS = 0x3
SETTINGS_INITIAL_WINDOW_SIZE = 0x4
SETTINGS_MAX_FRAME_SIZE = 0x5
SETTINGS_MAX_HEADER_LIST_SIZE = 0x6

# Error codes, section 7.
NO_ERROR = 0x0
PROTOCOL_ERROR = 0x1
INTERNAL_ERROR = 0x2
FLOW_CONTROL_ERROR = 0x3
STREAM_CLOSED = 0x5
FRAME_SIZE_ERROR = 0x6
REFUSED_STREAM = 0x7
CANCEL = 0x8
COMPRESSION_ERROR = 0x9
ENHANCE_YOUR_CALM = 0xB

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
DEFAULT_MAX_FRAME = 16_384

# Length as 2 + 1 bytes, type, flags, stream.
_HEADER = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")
_U32 = struct.Struct(">I")
HEADER_SIZE = _HEADER.size

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream identifier, payload."""


class ProtocolError(Exception):
    """The peer broke HTTP/2; the connection cannot go on."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Return the 9 bytes before a payload of `length` bytes."""
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return frame_header(len(payload), kind, flags, stream_id) + payload


def data_frames(
    stream_id: int, pieces: Iterable[bytes | memoryview], size: int, max_frame: int
) -> list[bytes | memoryview]:
    """Return DATA frames with the `pieces`, `size` bytes in all; the pieces are not copied."""
    parts: list[bytes | memoryview] = []
    left, room = size, 0
    for piece in pieces:
        length = len(piece)
        if length <= room:
            parts.append(piece)
            room -= length
            continue
        view, position = memoryview(piece), 0
        while position < length:
            if room == 0:
                room = min(max_frame, left)
                left -= room
                parts.append(frame_header(room, DATA, 0, stream_id))
            taken = min(room, length - position)
            parts.append(view[position : position + taken])
            position += taken
            room -= taken
    return parts


def settings_frame(values: dict[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(key, value) for key, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return the pairs of a SETTINGS payload.

    Raises:
        ProtocolError: the payload is not a list of pairs.
    """
    if len(payload) % _SETTING.size:
        raise ProtocolError(FRAME_SIZE_ERROR, "SETTINGS frame of a wrong size")
    return list(_SETTING.iter_unpack(payload))


def window_update_frame(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(increment))


def reset_frame(stream_id: int, code: int) -> bytes:
    """Return a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, _U32.pack(code))


def goaway_frame(last_stream_id: int, code: int, text: str = "") -> bytes:
    """Return a GOAWAY frame."""
    payload = _U32.pack(last_stream_id) + _U32.pack(code) + text.encode()[:1000]
    return frame(GOAWAY, 0, 0, payload)


def parse_u32(payload: bytes, offset: int = 0) -> int:
    """Return a 32-bit number without its reserved top bit.

    Raises:
        ProtocolError: the payload is too short.
    """
    if len(payload) < offset + 4:
        raise ProtocolError(FRAME_SIZE_ERROR, "frame is too short")
    number: int = _U32.unpack_from(payload, offset)[0]
    return number & 0x7FFF_FFFF


def strip_padding(flags: int, payload: bytes) -> bytes:
    """Return the payload of a DATA or HEADERS frame without padding and priority fields.

    Raises:
        ProtocolError: more padding than payload.
    """
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise ProtocolError(FRAME_SIZE_ERROR, "padded frame is empty")
        start, end = 1, end - payload[0]
    if flags & PRIORITY_FIELDS:
        start += 5
    if start > end:
        raise ProtocolError(PROTOCOL_ERROR, "frame has more padding than payload")
    return payload[start:end]


class FrameReader:
    """Cuts a byte stream, given in pieces of any size, into frames."""

    def __init__(self, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        self._max_frame = max_frame
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that end in `data`.

        The generator must be run to its end before the next call.

        Raises:
            ProtocolError: a frame is larger than we allow.
        """
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        unpack = _HEADER.unpack_from
        while size - position >= HEADER_SIZE:
            high, low, kind, flags, stream_id = unpack(data, position)
            length = high << 8 | low
            if length > self._max_frame:
                raise ProtocolError(FRAME_SIZE_ERROR, f"frame of {length} bytes is too large")
            end = position + HEADER_SIZE + length
            if end > size:
                break
            yield kind, flags, stream_id & 0x7FFF_FFFF, data[position + HEADER_SIZE : end]
            position = end
        self._rest = data[position:]
