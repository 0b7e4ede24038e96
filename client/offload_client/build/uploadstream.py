"""One upload call: messages go out, acknowledgements come back in their order."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import grpc

from offload_client.build.callerrors import node_error
from offload_core.aio import finish
from offload_core.errors import InternalError, NodeLostError
from offload_proto.v1 import node_service_pb2
from offload_proto.v1.node_service_pb2 import UploadResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from grpc import aio

    from offload_client.build.demand import Wanted
    from offload_client.build.packing import PackedBatch

LEAST_WINDOW_BYTES = 2 << 20
"""Unacknowledged bytes on one stream: two batches, so that one is on its way while the node
stores the other. What is on its way when a connection breaks is sent again."""
WINDOW_BYTES = 16 << 20
"""Most that a long way may hold."""
END_SECONDS = 5.0

_SERVICE = node_service_pb2.DESCRIPTOR.services_by_name["BlobsService"].full_name


@dataclass(slots=True)
class LinkTimes:
    """What is known of the way to the node; shared by all streams of a build."""

    acknowledgements: int = 0
    least_seconds: float = float("inf")
    """Shortest time from giving a batch to the transport to its acknowledgement."""


class _Sent(NamedTuple):
    parts: list[Wanted]
    message_bytes: int
    total_bytes: int
    at: float


class UploadStream:
    """One call of BlobsService.Upload; `run` once."""

    def __init__(
        self,
        channel: aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        next_batch: Callable[[], Awaitable[PackedBatch]],
        acknowledged: Callable[[int], None],
        times: LinkTimes,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            channel: to the node.
            metadata: of the call, with the build's id.
            next_batch: waits for something to send; shared by several streams.
            acknowledged: told the bytes of blobs that the node has verified and stored.
            times: of all streams of the build.
        """
        # Messages are serialised already.
        method: aio.StreamStreamMultiCallable[bytes, UploadResponse] = channel.stream_stream(
            f"/{_SERVICE}/Upload", response_deserializer=UploadResponse.FromString
        )
        self._call = method(metadata=metadata)
        self._next_batch = next_batch
        self._acknowledged = acknowledged
        self._sent: deque[_Sent] = deque()
        self._sent_bytes = 0
        self._window_bytes = LEAST_WINDOW_BYTES
        self._times = times
        self._room = asyncio.Condition()
        self._quiet_since = asyncio.get_running_loop().time()

    @property
    def batches(self) -> int:
        """Batches without acknowledgement."""
        return len(self._sent)

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes of blobs without acknowledgement, before compression."""
        return sum(sent.total_bytes for sent in self._sent)

    @property
    def quiet_seconds(self) -> float:
        """Seconds since it had something to do."""
        return 0.0 if self._sent else asyncio.get_running_loop().time() - self._quiet_since

    def unacknowledged(self) -> list[Wanted]:
        """Return the blobs that the node may not have, in order."""
        return [part for sent in self._sent for part in sent.parts]

    async def run(self) -> None:
        """Send until cancelled.

        Raises:
            NodeLostError: the connection broke, or the node ended the call.
            OffloadError: the node refused the upload.
        """
        sending = asyncio.ensure_future(self._send())
        receiving = asyncio.ensure_future(self._receive())
        try:
            # Sending ends without an error when the call is over; receiving says why.
            await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_EXCEPTION)
            if sending.done():
                sending.result()
            receiving.result()
        except grpc.RpcError as error:
            raise node_error(error) from error  # type: ignore[arg-type]
        finally:
            self._call.cancel()
            sending.cancel()
            receiving.cancel()
            # What is unacknowledged is known only when neither goes on.
            await finish(asyncio.wait((sending, receiving)), END_SECONDS)

    async def _send(self) -> None:
        while True:
            async with self._room:
                await self._room.wait_for(lambda: self._sent_bytes < self._window_bytes)
            batch = await self._next_batch()
            now = asyncio.get_running_loop().time()
            size = len(batch.message)
            self._sent.append(_Sent(batch.parts, size, batch.total_bytes, now))
            self._sent_bytes += size
            try:
                await self._call.write(batch.message)
            except (grpc.RpcError, asyncio.InvalidStateError):
                return
            del batch

    async def _receive(self) -> None:
        async for _ in self._call:
            if not self._sent:
                raise InternalError("the node acknowledged something that was not sent")
            now = asyncio.get_running_loop().time()
            sent = self._sent.popleft()
            self._fit_window(sent, now - sent.at)
            self._sent_bytes -= sent.message_bytes
            self._quiet_since = now
            async with self._room:
                self._room.notify()
            self._acknowledged(sent.total_bytes)
        raise NodeLostError("the node ended the upload of the build context")

    def _fit_window(self, sent: _Sent, seconds: float) -> None:
        """Let more be under way as long as that makes no queue.

        A batch that needs no more than twice the least time did not wait for others; where even
        one batch alone needs that long, it fills the link.
        """
        times = self._times
        times.acknowledgements += 1
        times.least_seconds = min(times.least_seconds, seconds)
        if seconds <= 2 * times.least_seconds and self._sent_bytes >= self._window_bytes:
            self._window_bytes = min(self._window_bytes + sent.message_bytes, WINDOW_BYTES)
