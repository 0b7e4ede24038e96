"""Runs of whole DATA frames that go from one stream to another as they are.

A relayed session is hundreds of thousands of small frames. Neither their payloads nor their
boundaries matter to who passes them on, so all that have come together are one object, whose
frames have the other stream's number already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.buildkit.h2 import frames

if TYPE_CHECKING:
    from offload_builder.buildkit.h2.frames import Buffer


class Run:
    """Frames in a row.

    Attributes:
        data: the frames with their headers.
        size: bytes of their payloads.
    """

    __slots__ = ("data", "size")

    def __init__(self, data: Buffer, size: int) -> None:
        self.data = data
        self.size = size

    def cut(self, limit: int) -> tuple[Run, list[Run | memoryview]]:
        """Return the frames with at most `limit` bytes, and the rest.

        The rest begins with the payload of a frame that is larger than what is left of the limit.
        """
        view, position, taken, length = memoryview(self.data), 0, 0, 0
        while taken < limit:
            length = view[position] << 16 | view[position + 1] << 8 | view[position + 2]
            if taken + length > limit:
                break
            taken += length
            position += frames.HEADER_SIZE + length
        front, left = Run(view[:position], taken), self.size - taken
        rest: list[Run | memoryview] = []
        if taken < limit and left:
            start = position + frames.HEADER_SIZE
            position = start + length
            rest.append(view[start:position])
            left -= length
        if left:
            rest.append(Run(view[position:], left))
        return front, rest
