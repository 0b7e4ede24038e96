"""The session's content service: BuildKit reads an OCI layout of the client blob by blob.

BuildKit names the layout in a header and calls Info, then Read for one range after the other, and
ends each Read as soon as it has its bytes.
Source: BuildKit's session/content and source/containerimage/ocilayout.go; containerd's
core/content/proxy.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from offload_builder.buildkit.h2.messages import INVALID_ARGUMENT, NOT_FOUND, GrpcError
from offload_proto.buildkit.content_pb2 import (
    Info,
    InfoRequest,
    InfoResponse,
    ReadContentRequest,
    ReadContentResponse,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from offload_builder.buildkit.h2.server import ServerCall

INFO = "/containerd.services.content.v1.Content/Info"
READ = "/containerd.services.content.v1.Content/Read"
_STORE_ID = "buildkit-attachable-store-id"
_STORE_PREFIXES = ("oci:", "local:")
"""Of an image in a layout, and of a cache (BuildKit's cache/remotecache/local)."""


class LayoutBlobs(Protocol):
    """The blobs of the OCI layouts that a build uses."""

    async def size(self, store: str, digest: str) -> int | None:
        """Return the bytes of a blob, None when the layout does not have it.

        Args:
            store: what follows "oci-layout://" in the attribute of the named context.
            digest: "sha256:<hex>".
        """
        ...

    def read(
        self, store: str, digest: str, offset: int, size: int
    ) -> AsyncGenerator[bytes | memoryview]:
        """Yield `size` bytes of a blob from `offset` on, in pieces of at most 1 MiB.

        Both are within the blob. The caller may stop after the last byte.

        Raises:
            NotFoundError: the layout does not have it.
        """
        ...


def content_services(blobs: LayoutBlobs) -> dict[str, Callable[[ServerCall], Awaitable[None]]]:
    """Return the handlers of the content service by method name."""
    return {
        INFO: lambda call: _serve_info(call, blobs),
        READ: lambda call: _serve_read(call, blobs),
    }


async def _serve_info(call: ServerCall, blobs: LayoutBlobs) -> None:
    request = InfoRequest.FromString(await call.receive_one())
    size = await _size(blobs, _store(call), request.digest)
    answer = InfoResponse(info=Info(digest=request.digest, size=size))
    await call.send([answer.SerializeToString()])


async def _serve_read(call: ServerCall, blobs: LayoutBlobs) -> None:
    request = ReadContentRequest.FromString(await call.receive_one())
    store, offset = _store(call), max(0, request.offset)
    left = await _size(blobs, store, request.digest) - offset
    if left < 0:
        raise GrpcError(
            INVALID_ARGUMENT, f"content {request.digest} has no bytes at offset {offset}"
        )
    if request.size > 0:
        left = min(left, request.size)
    if left == 0:
        return
    async with aclosing(blobs.read(store, request.digest, offset, left)) as pieces:
        async for piece in pieces:
            answer = ReadContentResponse(offset=offset, data=bytes(piece))
            offset += len(piece)
            await call.send([answer.SerializeToString()])


def _store(call: ServerCall) -> str:
    name = call.metadata.get(_STORE_ID, [""])[0]
    for prefix in _STORE_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    raise GrpcError(NOT_FOUND, f"unknown store {name}")


async def _size(blobs: LayoutBlobs, store: str, digest: str) -> int:
    size = await blobs.size(store, digest)
    if size is None:
        raise GrpcError(NOT_FOUND, f"content {digest}: not found")
    return size
