"""Exporter streams on their way from BuildKit to the client, with back-pressure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_core.errors import InternalError, NotFoundError
from offload_proto.v1.node_service_pb2 import OutputReady, RunResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.solveplan import Exporter

QUEUE_PIECES = 16
MESSAGE_BYTES = 512 << 10


class OutputStream:
    """One stream: BuildKit writes, the client reads; at most a few pieces are in between."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_PIECES)
        self._aborted = False
        self._buffer = bytearray()
        self.finished = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Take the next bytes; waits while the client is behind.

        Raises:
            InternalError: the client is gone.
        """
        if self._aborted:
            raise InternalError("nobody reads this output any more")
        # The daemon writes 32 KiB pieces; larger messages cost much less per byte.
        self._buffer += data
        if len(self._buffer) >= MESSAGE_BYTES:
            await self._flush()

    async def close(self) -> None:
        """All bytes were written; returns when the client has taken them."""
        await self._flush()
        await self._pieces.put(None)
        await self.finished.wait()

    async def abort(self) -> None:
        """The output will not be completed."""
        self.stop()

    async def _flush(self) -> None:
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            await self._pieces.put(data)

    def stop(self) -> None:
        """End both sides at once."""
        self._aborted = True
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self._pieces.put_nowait(None)
        self.finished.set()

    async def read(self) -> AsyncIterator[bytes]:
        """Yield the bytes.

        Raises:
            InternalError: the build failed before the end of the output.
        """
        try:
            while (data := await self._pieces.get()) is not None:
                yield data
            if self._aborted:
                raise InternalError("the build ended before its output was complete")
        finally:
            self.finished.set()


class Outputs:
    """The output streams of one build; implements BuildKit's OutputSink."""

    def __init__(self, link: ClientLink, exporters: Sequence[Exporter]) -> None:
        self._link = link
        self._exporters = exporters
        self._streams: dict[int, OutputStream] = {}

    async def open(self, index: int, metadata: Mapping[str, str]) -> OutputStream:
        """Begin a stream and tell the client."""
        output_index = self._exporters[index].output_index
        stream = OutputStream()
        self._streams[output_index] = stream
        await self._link.outbox.put(
            RunResponse(
                output_ready=OutputReady(output_index=output_index, metadata=dict(metadata))
            )
        )
        return stream

    def read(self, output_index: int) -> AsyncIterator[bytes]:
        """Return the stream of an output.

        Raises:
            NotFoundError: the build has no such output, or it has not begun.
        """
        stream = self._streams.get(output_index)
        if stream is None:
            raise NotFoundError(f"the build has no output number {output_index}")
        return stream.read()

    @property
    def begun(self) -> bool:
        """Whether the client has been told of a stream; a repeated solve would garble it."""
        return bool(self._streams)

    def stop(self) -> None:
        """End all streams."""
        for stream in self._streams.values():
            if not stream.finished.is_set():
                stream.stop()
