"""Header blocks: HPACK state, blocks that span CONTINUATION frames, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hpack
from hpack.exceptions import HPACKError

from offload_builder.buildkit.h2 import frames

if TYPE_CHECKING:
    from collections.abc import Iterable

HeaderList = list[tuple[str, str]]

MAX_HEADER_LIST = 8 * 2**20
"""Bytes of a decoded header list that we accept.

BuildKit sends every line of .dockerignore as a header of its own; 3,000 lines are 90 kB.
"""


_ENTRY_BYTES = 32
_MAX_FRAMES = 2048
"""Of one block: frames of next to nothing would cost more than their bytes."""


def list_size(headers: HeaderList) -> int:
    """Return the bytes of a header list, as RFC 9113, section 10.5.1 counts them."""
    return sum(len(name) + len(value) + _ENTRY_BYTES for name, value in headers)


class HeaderEncoder:
    """Encodes header lists into HEADERS and CONTINUATION frames, in the order of sending."""

    def __init__(self) -> None:
        self._encoder = hpack.Encoder()
        self.max_frame = frames.DEFAULT_MAX_FRAME

    def set_table_size(self, size: int) -> None:
        """Follow the peer's SETTINGS_HEADER_TABLE_SIZE, at most the default size."""
        self._encoder.header_table_size = min(size, 4096)

    def encode(
        self, stream_id: int, headers: Iterable[tuple[str, str]], *, end_stream: bool
    ) -> bytes:
        """Return the frames of one header block."""
        block = self._encoder.encode(list(headers))
        flags = frames.END_STREAM if end_stream else 0
        kind = frames.HEADERS
        parts: list[bytes] = []
        while True:
            piece, block = block[: self.max_frame], block[self.max_frame :]
            if not block:
                flags |= frames.END_HEADERS
            parts.append(frames.frame(kind, flags, stream_id, piece))
            if not block:
                return b"".join(parts)
            kind, flags = frames.CONTINUATION, 0


class HeaderDecoder:
    """Assembles and decodes the header blocks of one connection.

    While `pending` is set only CONTINUATION frames of the same stream may come.
    """

    def __init__(self, max_bytes: int = MAX_HEADER_LIST) -> None:
        """Take header lists of at most `max_bytes`."""
        self._max_bytes = max_bytes
        self._decoder = hpack.Decoder(max_header_list_size=max_bytes)
        self._pieces: list[bytes] = []
        self._size = 0
        self._stream_id = 0
        self._end_stream = False

    @property
    def pending(self) -> bool:
        """Whether a block has begun and not ended."""
        return bool(self._pieces)

    def begin(
        self, flags: int, stream_id: int, payload: bytes
    ) -> tuple[int, HeaderList, bool] | None:
        """Take a HEADERS frame; return stream, headers and end-of-stream when it is whole.

        Raises:
            ProtocolError: the block is broken or too large.
        """
        self._stream_id = stream_id
        self._end_stream = bool(flags & frames.END_STREAM)
        self._size = 0
        return self._add(flags, frames.strip_padding(flags, payload))

    def go_on(
        self, flags: int, stream_id: int, payload: bytes
    ) -> tuple[int, HeaderList, bool] | None:
        """Take a CONTINUATION frame.

        Raises:
            ProtocolError: no block is open for this stream, or it is broken or too large.
        """
        if not self._pieces or stream_id != self._stream_id:
            raise frames.ProtocolError(frames.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        return self._add(flags, payload)

    def _add(self, flags: int, piece: bytes) -> tuple[int, HeaderList, bool] | None:
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._max_bytes or len(self._pieces) > _MAX_FRAMES:
            raise frames.ProtocolError(frames.ENHANCE_YOUR_CALM, "header block is too large")
        if not flags & frames.END_HEADERS:
            return None
        block = b"".join(self._pieces)
        self._pieces.clear()
        try:
            decoded = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise frames.ProtocolError(frames.COMPRESSION_ERROR, str(error)) from error
        # BuildKit's values are ASCII or escaped; a stray byte must not end the connection.
        headers = [
            (bytes(name).decode("latin-1"), bytes(value).decode("utf-8", "replace"))
            for name, value in decoded
        ]
        return self._stream_id, headers, self._end_stream
