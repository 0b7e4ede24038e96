"""The upload against a real gRPC server: everything asked for arrives, once, whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from offload_client.build.packing import encode_upload
from offload_client.build.readahead import BATCH_BLOBS, BATCH_BYTES
from offload_client.build.uploadstream import LEAST_WINDOW_BYTES
from offload_core.errors import ContextError, NodeLostError
from offload_core.tls import MAX_MESSAGE_BYTES
from offload_proto.v1.node_service_pb2 import BlobBatch, UploadRequest
from tests.fixtures.uploadreceiver import receiving, sending

if TYPE_CHECKING:
    from pathlib import Path

TEXT = b"".join(b"line %d of a source file\n" % number for number in range(30_000))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "c").mkdir()
    return tmp_path / "c"


async def test_files_of_all_sizes_arrive_once_and_in_bounded_batches(root: Path) -> None:
    (root / "text").write_bytes(TEXT[:5000])
    for number in range(20):
        (root / f"small{number}").write_bytes(os.urandom(100_000))
    (root / "edge").write_bytes(os.urandom(BATCH_BYTES))
    (root / "above").write_bytes(os.urandom(BATCH_BYTES + 1))
    (root / "four").write_bytes(os.urandom(4 << 20))
    (root / "large").write_bytes(os.urandom((4 << 20) + 1))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        count = sender.want_all()
        await sender.until(count)
        expected = {*sender.digests().values(), *sender.pieces("large")}
        assert receiver.blobs == dict.fromkeys(expected, 1)
        assert sender.said == []
        for blobs, size, _ in receiver.batches:
            assert size <= BATCH_BYTES or blobs == 1


async def test_thousands_of_tiny_files_travel_in_few_bounded_messages(root: Path) -> None:
    for number in range(10_000):
        (root / str(number)).write_text(str(number))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        await sender.until(sender.want_all())
        assert len(receiver.blobs) == 10_000
        assert [blobs for blobs, _, _ in receiver.batches] == [BATCH_BLOBS, BATCH_BLOBS, 1808]
        assert receiver.message_bytes < MAX_MESSAGE_BYTES / 4


async def test_blobs_arrive_in_the_order_in_which_they_are_wanted(root: Path) -> None:
    for number in range(50):
        (root / f"{number:02}").write_bytes(os.urandom(60_000))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        entries = sender.entries()
        wanted = entries[25:] + entries[:25]
        sender.uploader.want(1, wanted[:7])
        sender.uploader.want(1, wanted[7:])
        await sender.until(50)
        assert receiver.order == [sender.listing.content(number).sha256 for number in wanted]
        await sender.acknowledged(50 * 60_000)
        assert sender.uploader.acknowledged_bytes == 50 * 60_000


async def test_single_pieces_of_a_large_file_can_be_wanted(root: Path) -> None:
    (root / "large").write_bytes(os.urandom(9 << 20))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        pieces = sender.pieces("large")
        assert len(pieces) > 4
        sender.uploader.want(1, [], [(sender.entry("large"), [3, 1])])
        await sender.until(2)
        assert receiver.order == [pieces[3], pieces[1]]


async def test_changed_file_is_named_and_the_others_are_sent(root: Path) -> None:
    (root / "bad").write_text("bad")
    (root / "good").write_text("good")
    (root / "large").write_bytes(os.urandom(5 << 20))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        (root / "bad").write_text("changed meanwhile")
        (root / "large").write_bytes(os.urandom(5 << 20))
        sender.uploader.want(1, [sender.entry("bad"), sender.entry("good")])
        sender.uploader.want(1, [], [(sender.entry("large"), [0, 1, 2])])
        await sender.until(3)
        failures = {item.blob_failure.entry: item.blob_failure for item in sender.said}
        # One sentence for all pieces.
        assert failures.keys() == {sender.entry("bad"), sender.entry("large")}
        assert len(sender.said) == 2
        for name in ("bad", "large"):
            failure = failures[sender.entry(name)]
            assert failure.request_id == 1
            assert f'"{name}"' in failure.message
        assert receiver.order == [hashlib.sha256(b"good").digest()]


async def test_what_is_not_listed_is_refused_and_the_rest_is_sent(root: Path) -> None:
    (root / "empty").touch()
    (root / "file").write_text("file")
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        sender.uploader.want(1, [99])
        sender.uploader.want(2, [0])
        sender.uploader.want(1, [], [(1, [0]), (7, [0])])
        sender.uploader.want(1, [sender.entry("file")])
        await sender.until(4)
        found = [(item.blob_failure.request_id, item.blob_failure.entry) for item in sender.said]
        assert found == [(1, 99), (2, 0), (1, 1), (1, 7)]
        for item in sender.said:
            assert "not part of the build context" in item.blob_failure.message


async def test_context_that_vanishes_is_an_error_and_no_hang(root: Path, tmp_path: Path) -> None:
    (root / "x").write_text("x")
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        root.rename(tmp_path / "moved")
        sender.want_all()
        with pytest.raises(ContextError):
            await asyncio.wait_for(asyncio.shield(sender.task), 10)


async def test_node_that_ends_the_upload_is_an_error(root: Path) -> None:
    (root / "x").write_text("x")
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        receiver.end = True
        sender.want_all()
        with pytest.raises(NodeLostError, match="ended the upload") as caught:
            await asyncio.wait_for(asyncio.shield(sender.task), 10)
        assert not caught.value.connection_broke


async def test_node_that_does_not_read_holds_the_reading_back(root: Path) -> None:
    for number in range(40):
        (root / f"{number:02}").write_bytes(os.urandom(BATCH_BYTES))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        receiver.reading.clear()
        sender.uploader.want(1, sender.entries())
        await asyncio.sleep(0.5)
        # What has been read can be told from what has not by changing all.
        for number in range(40):
            (root / f"{number:02}").write_bytes(b"changed")
        receiver.reading.set()
        await sender.until(40)
        assert len(receiver.order) <= (LEAST_WINDOW_BYTES >> 20) + 9
        assert len(sender.said) == 40 - len(receiver.order)


async def test_slow_link_gets_compressed_batches(root: Path) -> None:
    for number in range(30):
        (root / str(number)).write_bytes(b"%d" % number + TEXT[: 1 << 19])
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        receiver.pause = 0.05
        await sender.until(sender.want_all())
        assert all(zstd for _, _, zstd in receiver.batches)
        assert receiver.message_bytes < receiver.received_bytes / 3


async def test_fast_link_gets_what_waits_for_nothing_as_it_is(root: Path) -> None:
    for number in range(12):
        (root / f"{number:02}").write_bytes(b"%d" % number + TEXT[:300_000])
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        for sent, number in enumerate(sender.entries()):
            sender.uploader.want(1, [number])
            await sender.until(sent + 1)
            await sender.acknowledged(sum(size for _, size, _ in receiver.batches))
        # Of the first nothing was known yet.
        assert [zstd for _, _, zstd in receiver.batches] == [True] + [False] * 11


async def test_content_that_does_not_become_smaller_is_never_compressed(root: Path) -> None:
    for number in range(12):
        (root / str(number)).write_bytes(os.urandom(500_000))
    async with receiving() as (receiver, address), sending(root, receiver, address) as sender:
        receiver.pause = 0.02
        await sender.until(sender.want_all())
        assert not any(zstd for _, _, zstd in receiver.batches)


def test_message_is_what_protobuf_makes() -> None:
    contents = [b"one", b"", b"x" * 300_000]
    sizes = [len(content) for content in contents]
    digests = [hashlib.sha256(content).digest() for content in contents]
    for zstd in (False, True):
        made = UploadRequest.FromString(encode_upload(digests, sizes, contents, zstd=zstd))
        assert made == UploadRequest(
            batch=BlobBatch(sha256=digests, sizes=sizes, data=b"".join(contents), zstd=zstd)
        )
