"""Sending the content that the node lacks, over as many connections as the link needs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_client.build.demand import WHOLE, Demand, Wanted, numbers
from offload_client.build.packing import FEW_BATCHES, PackedBatch, Packer
from offload_client.build.readahead import Listed, ReadAhead
from offload_client.build.uploadstream import END_SECONDS, LinkTimes, UploadStream
from offload_client.eventlog import get_logger
from offload_core.aio import finish
from offload_core.errors import OffloadError, find_offload_error
from offload_proto.v1.node_service_pb2 import RunRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from contextlib import AbstractAsyncContextManager

    from grpc import aio

    from offload_client.build.sendingstep import SendingStep
    from offload_client.context.listing import ClientListing
    from offload_client.context.source import ContextSource

MAX_STREAMS = 4
WIDEN_BYTES = 32 << 20
"""Less than this is sent before another connection is at full speed."""
WIDEN_LATENCY_SECONDS = 0.02
"""One connection fills a shorter link: 8 MiB in 20 ms are 400 MB/s."""
WIDEN_SAMPLES = 12
WIDEN_PAUSE_SECONDS = 0.1
QUIET_SECONDS = 2.0
"""A connection of our own that has had nothing to do for so long is closed."""


class Uploader:
    """The uploads of one build; the first stream is opened when the node asks for something."""

    def __init__(
        self,
        channel: aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        say: Callable[[RunRequest], Awaitable[None]],
        step: SendingStep,
        open_channel: Callable[[], AbstractAsyncContextManager[aio.Channel]],
    ) -> None:
        """Prepare an upload.

        Args:
            channel: to the node, for the first stream.
            metadata: metadata of the calls, with the build's id.
            say: sends a message on the control stream.
            step: shows what is sent.
            open_channel: opens another connection to the node, for one more stream.
        """
        self._channel = channel
        self._metadata = metadata
        self._say = say
        self._step = step
        self._open_channel = open_channel
        self._listed: dict[int, Listed] = {}
        self._demand = Demand()
        self._asked = asyncio.Event()
        # One message waits while others are written; what is read ahead waits before it.
        self._ready: asyncio.Queue[PackedBatch] = asyncio.Queue(1)
        self._streams: list[UploadStream] = []
        self._tasks = asyncio.TaskGroup()
        self._wanted_bytes = 0
        self._packed_bytes = 0
        self.acknowledged_bytes = 0
        """What the node has for good, before compression."""
        self.connections = 1
        """Streams that run or are being opened."""
        self._may_widen = True
        self._widened_at = float("-inf")
        self._times = LinkTimes()

    def offer(self, request_id: int, source: ContextSource, listing: ClientListing) -> None:
        """Remember where content can be read that the node may ask for."""
        self._listed[request_id] = Listed(source, listing)

    def want(
        self,
        request_id: int,
        entries: Iterable[int],
        chunks: Iterable[tuple[int, Iterable[int]]] = (),
    ) -> None:
        """Queue blobs for sending.

        Args:
            request_id: names the listing.
            entries: files, or chunk lists of large files, by number in the listing.
            chunks: pieces of large files: entry and numbers in its chunk list.
        """
        self._demand.add(Wanted(request_id, WHOLE, numbers(entries)))
        for entry, pieces in chunks:
            self._demand.add(Wanted(request_id, entry, numbers(pieces)))
        self._asked.set()

    async def run(self) -> None:
        """Send until cancelled.

        Raises:
            NodeLostError: the first stream to the node broke.
            ContextError: a source of the build context cannot be opened any more.
            OffloadError: the node refused the upload.
        """
        await self._asked.wait()
        try:
            with ReadAhead(self._demand, self._listed) as ahead, Packer() as packer:
                async with self._tasks as tasks:
                    tasks.create_task(self._fill(ahead, packer))
                    tasks.create_task(self._first_stream())
        except BaseExceptionGroup as group:
            raise (find_offload_error(group) or group) from None

    async def _fill(self, ahead: ReadAhead, packer: Packer) -> None:
        while True:
            batch = await ahead.next()
            for failure in batch.failures:
                await self._say(RunRequest(blob_failure=failure))
            self._wanted_bytes += batch.wanted_bytes
            self._step.wanted(batch.wanted_bytes)
            if not batch.sizes:
                continue
            self._packed_bytes += batch.total_bytes
            packed = await packer.pack(batch, compress=self._link_is_slow())
            del batch
            await self._ready.put(packed)
            del packed

    def _link_is_slow(self) -> bool:
        """Return whether batches pile up, so that the compressor is not what they wait for."""
        under_way = self._ready.qsize() + sum(stream.batches for stream in self._streams)
        return not self._times.acknowledgements or under_way >= FEW_BATCHES

    def _stream(self, channel: aio.Channel) -> UploadStream:
        stream = UploadStream(
            channel, self._metadata, self._ready.get, self._on_acknowledged, self._times
        )
        self._streams.append(stream)
        return stream

    async def _first_stream(self) -> None:
        await self._stream(self._channel).run()

    async def _further_stream(self) -> None:
        """Send over a connection of its own; what it loses, the others send."""
        try:
            async with self._open_channel() as channel:
                stream = self._stream(channel)
                try:
                    await _run_until_quiet(stream)
                finally:
                    self._streams.remove(stream)
                    self._packed_bytes -= stream.unacknowledged_bytes
                    self._demand.put_back(stream.unacknowledged())
        except OffloadError as error:
            self._may_widen = False
            get_logger().info("upload.stream.lost", reason=error.message)
        finally:
            self.connections -= 1

    def _on_acknowledged(self, total_bytes: int) -> None:
        self.acknowledged_bytes += total_bytes
        self._step.sent(total_bytes)
        now = asyncio.get_running_loop().time()
        if self._one_more_helps() and now - self._widened_at >= WIDEN_PAUSE_SECONDS:
            self._widened_at = now
            self.connections += 1
            self._tasks.create_task(self._further_stream())

    def _one_more_helps(self) -> bool:
        """Return whether one connection more would send a large rest faster.

        Only where the way is long: there a connection is limited by its windows and not by the
        link. The least latency says so, because that of others is made by the queue before them.
        """
        return (
            self._may_widen
            and self.connections < MAX_STREAMS
            and self._ready.full()
            and self._wanted_bytes - self._packed_bytes >= WIDEN_BYTES
            and self._times.acknowledgements >= WIDEN_SAMPLES
            and self._times.least_seconds >= WIDEN_LATENCY_SECONDS
        )


async def _run_until_quiet(stream: UploadStream) -> None:
    running = asyncio.ensure_future(stream.run())
    try:
        while stream.quiet_seconds < QUIET_SECONDS:
            await asyncio.wait((running,), timeout=QUIET_SECONDS / 2)
            if running.done():
                running.result()
    finally:
        running.cancel()
        await finish(asyncio.wait((running,)), 2 * END_SECONDS)
        if running.done() and not running.cancelled():
            # Its error has been raised above, or this task is cancelled itself.
            running.exception()
