"""The image at the node, read blob by blob for the local engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from offload_core.errors import NodeLostError
from offload_core.status import error_from_rpc
from offload_proto.v1.node_service_pb2 import DownloadRequest, ReadOutputRequest
from offload_proto.v1.node_service_pb2_grpc import BlobsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpc import aio


class NodeImageSource:
    """Implements `offload_client.load.source.ImageSource` over the node's blob service."""

    def __init__(self, channel: aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = BlobsServiceStub(channel)
        self._metadata = metadata
        self.received_bytes = 0

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        """Return media type and bytes of a manifest or index."""
        media_type, parts = "", []
        call = self._stub.Download(
            DownloadRequest(digest=digest, manifest=True), metadata=self._metadata
        )
        try:
            async for message in call:
                media_type = media_type or message.media_type
                parts.append(message.data)
        except grpc.RpcError as error:
            raise _translated(error) from error
        data = b"".join(parts)
        self.received_bytes += len(data)
        return media_type, data

    async def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield the bytes of a blob from `offset` on."""
        call = self._stub.Download(
            DownloadRequest(digest=digest, offset_bytes=offset), metadata=self._metadata
        )
        try:
            async for message in call:
                if message.data:
                    self.received_bytes += len(message.data)
                    yield message.data
        except grpc.RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()

    async def output(self, index: int) -> AsyncIterator[bytes]:
        """Yield the stream of an exporter."""
        call = self._stub.ReadOutput(ReadOutputRequest(output_index=index), metadata=self._metadata)
        try:
            async for message in call:
                self.received_bytes += len(message.data)
                yield message.data
        except grpc.RpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()


def _translated(error: grpc.RpcError) -> Exception:
    return error_from_rpc(
        error,  # type: ignore[arg-type]
        peer="the node",
        unreachable=NodeLostError,
    )
