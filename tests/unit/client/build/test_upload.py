"""The upload stream against a real gRPC server: everything asked for arrives, once, whole."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from grpc import aio

from offload_client.build import upload as module
from offload_client.build.upload import Uploader
from offload_client.context.scan import scan_context
from offload_client.progress.display import make_display
from offload_core.errors import ContextError, NodeLostError
from offload_core.tls import MAX_MESSAGE_BYTES
from offload_proto.v1.node_service_pb2 import RunRequest, UploadResponse
from offload_proto.v1.node_service_pb2_grpc import (
    BlobsServiceServicer,
    add_BlobsServiceServicer_to_server,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_client.context.entries import TreeEntry


class Receiver(BlobsServiceServicer):
    """Unpacks and verifies what comes."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, int] = {}
        self.largest_message = 0
        self.messages = 0
        self._parts: dict[bytes, bytes] = {}
        self.end = asyncio.Event()

    async def Upload(self, request_iterator: Any, context: Any) -> Any:
        async for request in request_iterator:
            self.messages += 1
            self.largest_message = max(self.largest_message, request.ByteSize())
            if request.WhichOneof("message") == "batch":
                batch = request.batch
                data = io.BytesIO(unpacked(batch.data, batch.zstd))
                for digest, size in zip(batch.sha256, batch.sizes, strict=True):
                    self._take(digest, data.read(size))
                assert not data.read()
            else:
                chunk = request.chunk
                parts = self._parts.get(chunk.sha256, b"")
                assert chunk.offset_bytes == len(parts)
                parts += unpacked(chunk.data, chunk.zstd)
                self._parts[chunk.sha256] = parts
                if len(parts) == chunk.size_bytes:
                    self._take(chunk.sha256, self._parts.pop(chunk.sha256))
            if self.end.is_set():
                return
            yield UploadResponse()

    def _take(self, digest: bytes, data: bytes) -> None:
        assert hashlib.sha256(data).digest() == digest
        self.blobs[digest] = self.blobs.get(digest, 0) + 1


def unpacked(data: bytes, zstd: bool) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data) if zstd else data


class Running:
    """An uploader at work."""

    def __init__(self, receiver: Receiver, channel: aio.Channel, root: Path) -> None:
        self.receiver = receiver
        self.said: list[RunRequest] = []
        self.display = make_display("plain", io.BytesIO(), {})
        self.uploader = Uploader(channel, (), self._say, self.display)
        self.entries: list[TreeEntry] = list(scan_context(root, warn=lambda _: None))
        self.digests = [entry.sha256 for entry in self.entries if entry.sha256]
        self.uploader.offer(root, self.entries)
        self.task = asyncio.create_task(self.uploader.run())

    async def _say(self, message: RunRequest) -> None:
        self.said.append(message)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.receiver.blobs) + len(self.said) < count and not self.task.done():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def uploading(root: Path, socket: Path) -> AsyncIterator[Running]:
    server = aio.server(options=(("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),))
    receiver = Receiver()
    add_BlobsServiceServicer_to_server(receiver, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    async with aio.insecure_channel(f"unix:{socket}") as channel:
        running = Running(receiver, channel, root)
        try:
            yield running
        finally:
            running.task.cancel()
            await asyncio.wait((running.task,))
            running.display.finish(None)
            await server.stop(None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "c").mkdir()
    return tmp_path / "c"


async def test_empty_small_and_large_files_arrive_whole(root: Path, tmp_path: Path) -> None:
    (root / "empty").write_bytes(b"")
    (root / "text").write_bytes(b"word " * 1000)
    (root / "edge").write_bytes(os.urandom(module.LARGE_BYTES))
    (root / "large").write_bytes(os.urandom(module.CHUNK_BYTES * 3))
    (root / "zeros").write_bytes(bytes(module.CHUNK_BYTES * 2 + 1))
    async with uploading(root, tmp_path / "s") as running:
        running.uploader.want(running.digests)
        await running.until(5)
        assert running.receiver.blobs == dict.fromkeys(running.digests, 1)
        assert running.said == []


async def test_thousands_of_tiny_files_travel_in_few_bounded_messages(
    root: Path, tmp_path: Path
) -> None:
    for number in range(9000):
        (root / str(number)).write_text(str(number))
    async with uploading(root, tmp_path / "s") as running:
        running.uploader.want(running.digests)
        await running.until(9000)
        assert len(running.receiver.blobs) == 9000
        assert running.receiver.messages == 3
        assert running.receiver.largest_message < MAX_MESSAGE_BYTES / 4


async def test_content_that_is_asked_for_twice_at_once_travels_once(
    root: Path, tmp_path: Path
) -> None:
    (root / "a").write_bytes(os.urandom(module.LARGE_BYTES + 1))
    (root / "b").write_bytes((root / "a").read_bytes())
    async with uploading(root, tmp_path / "s") as running:
        running.uploader.want(running.digests + running.digests[:1])
        await running.until(1)
        assert running.receiver.blobs == {running.digests[0]: 1}


async def test_unknown_and_changed_content_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    (root / "good").write_text("good")
    (root / "bad").write_text("bad")
    async with uploading(root, tmp_path / "s") as running:
        (root / "bad").write_text("changed meanwhile")
        running.uploader.want([*running.digests, b"\1" * 32])
        await running.until(3)
        failures = {item.blob_failure.sha256: item.blob_failure.message for item in running.said}
        assert "not part of the build context" in failures[b"\1" * 32]
        assert any('"bad"' in text for text in failures.values())
        assert list(running.receiver.blobs) == [hashlib.sha256(b"good").digest()]


async def test_context_that_vanishes_is_an_error_and_no_hang(root: Path, tmp_path: Path) -> None:
    (root / "x").write_text("x")
    async with uploading(root, tmp_path / "s") as running:
        root.rename(tmp_path / "moved")
        running.uploader.want(running.digests)
        with pytest.raises(ContextError):
            await asyncio.wait_for(asyncio.shield(running.task), 10)


async def test_node_that_ends_the_upload_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "x").write_text("x")
    async with uploading(root, tmp_path / "s") as running:
        running.receiver.end.set()
        running.uploader.want(running.digests)
        with pytest.raises(NodeLostError):
            await asyncio.wait_for(asyncio.shield(running.task), 10)
