"""HTTP/2 frames: numbers of RFC 9113, encoding, and cutting a byte stream into frames."""

from __future__ import annotations

import struct
import threading
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

Buffer = bytes | memoryview

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream identifier, payload; of a `RUN`: how many frames, and all of them."""
RUN = -1
"""Stands for several DATA frames of one stream, without flags and not empty."""
READ_SIZE = 256 * 2**10


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
) -> list[Buffer]:
    """Return DATA frames with the `pieces`, `size` bytes in all; the pieces are not copied."""
    parts: list[Buffer] = []
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


class _Scratch(threading.local):
    """Memory of one thread into which bytes are received."""

    def __init__(self) -> None:
        self.buffer = bytearray()


_scratch = _Scratch()


class FrameReader:
    """Cuts a byte stream, given in pieces of any size, into frames.

    Bytes come with `feed`, or are written into `room` and announced with `filled`. Streams in
    `joined` have their DATA frames handed out in runs.
    """

    def __init__(self, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        self.joined: dict[int, int] = {}
        """By stream: the number that its frames get."""
        self._max_frame = max_frame
        self._rest: bytes | bytearray = b""
        self._position = 0

    def room(self) -> memoryview:
        """Return where the next bytes can be written at once; it is never empty.

        All readers of a thread share it, so it costs nothing while a connection is silent.
        """
        needed = READ_SIZE + len(self._rest)
        if len(_scratch.buffer) < needed:
            _scratch.buffer = bytearray(needed + self._max_frame)
        _scratch.buffer[: len(self._rest)] = self._rest
        return memoryview(_scratch.buffer)[len(self._rest) :]

    def filled(self, size: int) -> Iterator[Frame]:
        """Do as `feed` with `size` bytes in `room`, which nobody else may have used since."""
        buffer, end = _scratch.buffer, len(self._rest) + size
        yield from self._cut(buffer, end)
        self._rest = buffer[self._position : end]

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that end in `data`.

        The generator must be run to its end before the next call.

        Raises:
            ProtocolError: a frame is larger than we allow.
        """
        whole = bytearray(self._rest + data) if self.joined else self._rest + data
        yield from self._cut(whole, len(whole))
        self._rest = whole[self._position :]

    def _cut(self, data: bytes | bytearray, size: int) -> Iterator[Frame]:
        position, unpack, joined = 0, _HEADER.unpack_from, self.joined
        view = memoryview(data)
        while size - position >= HEADER_SIZE:
            high, low, kind, flags, stream_id = unpack(data, position)
            length = high << 8 | low
            if length > self._max_frame:
                raise ProtocolError(FRAME_SIZE_ERROR, f"frame of {length} bytes is too large")
            end = position + HEADER_SIZE + length
            if end > size:
                break
            if kind == DATA and stream_id in joined and not flags and length:
                end, count = self._run(data, position, size)
                yield RUN, count, stream_id, bytes(view[position:end])
            else:
                payload = bytes(view[position + HEADER_SIZE : end])
                yield kind, flags, stream_id & 0x7FFF_FFFF, payload
            position = end
        self._position = position

    def _run(self, data: bytes | bytearray, position: int, size: int) -> tuple[int, int]:
        """Give DATA frames in a row their new number; return where they end, and how many."""
        unpack, readdress, largest = _HEADER.unpack_from, _U32.pack_into, self._max_frame
        stream_id: int = unpack(data, position)[4]
        number, count = self.joined[stream_id], 0
        while size - position >= HEADER_SIZE:
            high, low, kind, flags, found = unpack(data, position)
            length = high << 8 | low
            end = position + HEADER_SIZE + length
            if kind or flags or found != stream_id or end > size or not 0 < length <= largest:
                break
            readdress(data, position + 5, number)
            position = end
            count += 1
        return position, count
