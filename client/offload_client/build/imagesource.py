"""The image at the node, read blob by blob for the local engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_core.errors import NodeLostError
from offload_proto.v1.node_service_pb2 import DownloadRequest, ReadOutputRequest
from offload_proto.v1.node_service_pb2_grpc import BlobsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from grpc import aio


class NodeImageSource:
    """Implements `offload_client.load.source.ImageSource` over the node's blob service."""

    def __init__(
        self,
        channel: aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        renewed: Callable[[aio.Channel], Awaitable[aio.Channel]] | None = None,
    ) -> None:
        """Read over a connection.

        Args:
            channel: to the node.
            metadata: of the calls, with the build's id.
            renewed: waits for the connection that takes the place of one that broke; None when
                there is none.
        """
        self._channel = channel
        self._metadata = metadata
        self._renewed = renewed

    @property
    def channel(self) -> aio.Channel:
        """The connection to the node now."""
        return self._channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls for the build carry."""
        return self._metadata

    def use(self, channel: aio.Channel) -> None:
        """Go over to another connection; what is on its way follows when its own breaks."""
        self._channel = channel

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        """Return media type and bytes of a manifest or index."""
        while True:
            channel = self._channel
            try:
                return await self._manifest(digest)
            except grpc.RpcError as error:
                await self._renew(channel, error)

    async def _manifest(self, digest: str) -> tuple[str, bytes]:
        media_type, parts = "", []
        call = BlobsServiceStub(self._channel).Download(
            DownloadRequest(digest=digest, manifest=True), metadata=self._metadata
        )
        async for message in call:
            media_type = media_type or message.media_type
            parts.append(message.data)
        return media_type, b"".join(parts)

    async def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield the bytes of a blob from `offset` on; a lost connection only delays them."""
        while True:
            channel = self._channel
            call = BlobsServiceStub(channel).Download(
                DownloadRequest(digest=digest, offset_bytes=offset), metadata=self._metadata
            )
            try:
                async for message in call:
                    if message.data:
                        offset += len(message.data)
                        yield message.data
                return
            except grpc.RpcError as error:
                await self._renew(channel, error)
            finally:
                call.cancel()

    async def _renew(self, channel: aio.Channel, failure: grpc.RpcError) -> None:
        """Go over to the next connection, or raise why there is none."""
        error = node_error(failure)  # type: ignore[arg-type]
        broke = isinstance(error, NodeLostError) and error.connection_broke
        if self._renewed is None or not broke:
            raise error from failure
        self._channel = await self._renewed(channel)

    async def output(self, index: int) -> AsyncIterator[bytes]:
        """Yield the stream of an exporter."""
        call = BlobsServiceStub(self._channel).ReadOutput(
            ReadOutputRequest(output_index=index), metadata=self._metadata
        )
        try:
            async for message in call:
                yield message.data
        except grpc.RpcError as error:
            raise node_error(error) from error  # type: ignore[arg-type]
        finally:
            call.cancel()
