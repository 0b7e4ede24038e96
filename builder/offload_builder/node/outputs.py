"""Exporter streams on their way from BuildKit to the client, with back-pressure.

A stream ends well for the client only after the whole solve ended well: BuildKit closes a stream
in the same way when its exporter fails half-way, and a truncated archive must not look complete.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_core.errors import BuildFailedError, NotFoundError, OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import OutputReady, RunResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.solveplan import Exporter

QUEUE_PIECES = 16
MESSAGE_BYTES = 512 << 10
UNOPENED_SECONDS = 60.0
"""An output that was announced and that the client does not begin to read fails the build."""
STALLED_SECONDS = 600.0
"""The same for one that is read no further; whoever pages through `-o -` may take a while."""
VERDICT_SECONDS = 15.0


class OutputStream:
    """One stream: BuildKit writes, the client reads; at most a few pieces are in between."""

    def __init__(
        self,
        index: int,
        verdict: asyncio.Future[OffloadError | None],
        *,
        unopened_seconds: float = UNOPENED_SECONDS,
        stalled_seconds: float = STALLED_SECONDS,
        announcement: OutputReady | None = None,
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare a stream.

        Args:
            index: of the output, for sentences.
            verdict: how the solve ended; None is well. Not cancelled here.
            unopened_seconds: patience with a client that does not begin to read.
            stalled_seconds: patience with a client that stops reading.
            announcement: what the client is told of it.
            away: whether no client is there; a stream that was not begun waits for the next.
        """
        self.announcement = announcement or OutputReady(output_index=index)
        self._away = away
        self._index = index
        self._verdict = verdict
        self._patience = (unopened_seconds, stalled_seconds)
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_PIECES)
        self._buffer = bytearray()
        self._opened = False
        self._reads = 0
        self._broken: OffloadError | None = None
        """Why the client gets no more, told to BuildKit."""
        self._stopped = False
        self._taken = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Take the next bytes; waits while the client is behind.

        Raises:
            BuildFailedError: the client does not read any more.
        """
        # The daemon writes 32 KiB pieces; larger messages cost much less per byte.
        self._buffer += data
        if len(self._buffer) >= MESSAGE_BYTES:
            await self._flush()

    async def close(self) -> None:
        """All bytes were written; returns when the client has taken them.

        Raises:
            BuildFailedError: the client does not read any more.
        """
        await self._flush()
        await self._put(None)
        while not self._taken.is_set():
            before = (self._opened, self._reads)
            try:
                async with asyncio.timeout(self._patience[self._opened]):
                    await self._taken.wait()
            except TimeoutError:
                if before == (self._opened, self._reads) and not self._awaited:
                    self._break(self._unread())
        self._check()

    async def abort(self) -> None:
        """The output will not be completed."""
        self.stop()

    async def _flush(self) -> None:
        self._check()
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            await self._put(data)

    async def _put(self, piece: bytes | None) -> None:
        while True:
            opened = self._opened
            try:
                async with asyncio.timeout(self._patience[opened]):
                    await self._pieces.put(piece)
            except TimeoutError:
                if opened != self._opened or self._awaited:
                    continue  # it has only just begun to read, or is not there
                self._break(self._unread())
            self._check()
            return

    @property
    def _awaited(self) -> bool:
        return not self._opened and self._away()

    @property
    def unread(self) -> bool:
        """Whether a client may still begin to read it."""
        return not self._opened and not self._taken.is_set()

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _unread(self) -> BuildFailedError:
        return BuildFailedError(
            f"the client has not read output {self._index} of the build for "
            f"{self._patience[self._opened]:.0f} seconds"
        )

    def _break(self, error: OffloadError) -> None:
        self._broken = self._broken or error
        self.stop()

    def stop(self) -> None:
        """End both sides at once; harmless when the client has taken everything."""
        if self._taken.is_set():
            return
        self._stopped = True
        self._broken = self._broken or BuildFailedError(
            f"output {self._index} of the build was given up"
        )
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self._pieces.put_nowait(None)
        self._taken.set()

    async def read(self) -> AsyncGenerator[bytes]:
        """Yield the bytes, once.

        Raises:
            UsageError: it is read already.
            OffloadError: why the build failed.
        """
        if self._opened:
            raise UsageError(f"output {self._index} of the build is read already")
        self._opened = True
        complete = False
        try:
            while (data := await self._pieces.get()) is not None:
                self._reads += 1
                yield data
            self._taken.set()
            complete = not self._stopped
            await self._end()
        finally:
            if not complete:
                self._break(
                    BuildFailedError(
                        f"the client stopped reading output {self._index} of the build"
                    )
                )

    async def _end(self) -> None:
        """Return when the build is known to have ended well."""
        verdict: OffloadError | None = None
        known = self._verdict.done() or not self._stopped
        if known:
            verdict = await asyncio.shield(self._verdict)
        else:
            await asyncio.wait((self._verdict,), timeout=VERDICT_SECONDS)
            verdict = self._verdict.result() if self._verdict.done() else None
        if verdict is None and self._stopped:
            verdict = self._broken
        if verdict is not None:
            # A fresh object: the same verdict is raised for every output.
            raise type(verdict)(verdict.message, hint=verdict.hint)


class Outputs:
    """The output streams of one build; implements BuildKit's OutputSink."""

    def __init__(self, link: ClientLink, exporters: Sequence[Exporter]) -> None:
        self._link = link
        self._exporters = exporters
        self._streams: dict[int, OutputStream] = {}
        self._verdict: asyncio.Future[OffloadError | None] = (
            asyncio.get_running_loop().create_future()
        )

    async def open(self, index: int, metadata: Mapping[str, str]) -> OutputStream:
        """Begin a stream and tell the client.

        Raises:
            NotFoundError: there is no such exporter.
        """
        if not 0 <= index < len(self._exporters) or not self._exporters[index].streams:
            raise NotFoundError(f"the build has no exporter number {index} that streams")
        output_index = self._exporters[index].output_index
        if output_index in self._streams:
            raise UsageError(f"output {output_index} of the build has begun already")
        ready = OutputReady(output_index=output_index, metadata=dict(metadata))
        stream = self._streams[output_index] = OutputStream(
            output_index, self._verdict, announcement=ready, away=lambda: self._link.away
        )
        await self._link.outbox.put(RunResponse(output_ready=ready))
        return stream

    def repeated(self) -> list[RunResponse]:
        """Return what a client that comes back is told: the streams that nobody began to read."""
        return [
            RunResponse(output_ready=stream.announcement)
            for stream in self._streams.values()
            if stream.unread
        ]

    def read(self, output_index: int) -> AsyncGenerator[bytes]:
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

    def settle(self, error: OffloadError | None) -> None:
        """Say how the solve ended; the first word holds."""
        if not self._verdict.done():
            self._verdict.set_result(error)

    def stop(self) -> None:
        """End all streams."""
        self.settle(BuildFailedError("the build ended before its output was complete"))
        for stream in self._streams.values():
            stream.stop()
