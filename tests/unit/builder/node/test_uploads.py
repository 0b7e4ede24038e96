"""What arrives in an upload is verified before anybody sees it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import zstandard

from offload_builder.node.clientlink import ClientLink
from offload_builder.node.contextstore import ContextStore
from offload_builder.node.uploads import Upload
from offload_core.errors import ContextChangedError, NodeLostError, UsageError
from offload_proto.v1.builds_service_pb2 import BuildStats
from offload_proto.v1.node_service_pb2 import BlobBatch, BlobChunk, UploadRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Case:
    def __init__(self, store: ContextStore) -> None:
        self.store = store
        self.link = ClientLink()
        self.stats = BuildStats()

    async def want(self, *contents: bytes) -> None:
        await self.link.request_blobs({sha(data): len(data) for data in contents})

    async def send(self, *requests: UploadRequest) -> list[tuple[int, int]]:
        async def stream() -> AsyncIterator[UploadRequest]:
            for request in requests:
                yield request

        upload = Upload(self.store, self.link, self.stats)
        return [(r.stored_blobs, r.stored_bytes) async for r in upload.run(stream())]

    async def stored(self, *contents: bytes) -> bool:
        return not await self.store.run(self.store.missing_sync, [sha(data) for data in contents])


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    async with ContextStore(tmp_path / "context", keep_bytes=1 << 30) as store:
        found = Case(store)
        yield found
        found.link.lose(NodeLostError("over"))


def batch(*contents: bytes, zstd: bool = False) -> UploadRequest:
    data = b"".join(contents)
    return UploadRequest(
        batch=BlobBatch(
            sha256=[sha(item) for item in contents],
            sizes=[len(item) for item in contents],
            data=zstandard.compress(data) if zstd else data,
            zstd=zstd,
        )
    )


def chunks(data: bytes, size: int) -> list[UploadRequest]:
    return [
        UploadRequest(
            chunk=BlobChunk(
                sha256=sha(data),
                size_bytes=len(data),
                offset_bytes=start,
                data=data[start : start + size],
            )
        )
        for start in range(0, len(data), size)
    ]


@pytest.mark.parametrize("zstd", [False, True])
async def test_batch_is_stored_and_announced(case, zstd):
    await case.want(b"one", b"two")
    assert await case.send(batch(b"one", b"two", zstd=zstd)) == [(2, 6)]
    await case.link.arrival(sha(b"one"))
    assert await case.stored(b"one", b"two")
    assert case.stats.context_sent_bytes == 6


async def test_blobs_that_nobody_wants_are_not_stored(case):
    await case.want(b"one")
    assert await case.send(batch(b"one", b"unasked")) == [(1, 10)]
    assert not await case.stored(b"unasked")


async def test_large_file_in_chunks(case):
    data = bytes(range(256)) * 4000
    await case.want(data)
    answers = await case.send(*chunks(data, 100_000))
    assert answers[-1] == (1, len(data))
    assert await case.stored(data)


async def test_upload_that_breaks_off_leaves_nothing_and_can_be_repeated(case, tmp_path):
    data = b"y" * 1000
    await case.want(data)
    await case.send(*chunks(data, 300)[:2])
    await case.store.run(lambda: None)
    assert list((tmp_path / "context").glob("new-*")) == []
    assert case.link.wanted(sha(data))
    await case.send(*chunks(data, 300))
    assert await case.stored(data)


async def test_wrong_content_fails_all_that_wait(case):
    await case.want(b"good", b"other")
    wrong = batch(b"good")
    wrong.batch.data = b"evil"
    with pytest.raises(ContextChangedError):
        await case.send(wrong)
    for data in (b"good", b"other"):
        with pytest.raises(ContextChangedError):
            await case.link.arrival(sha(data))
        assert not await case.stored(data)


async def test_pieces_of_two_files_may_not_mix(case):
    one, two = b"1" * 1000, b"2" * 1000
    await case.want(one, two)
    with pytest.raises(UsageError, match="out of order"):
        await case.send(chunks(one, 500)[0], chunks(two, 500)[1])


async def test_nothing_is_taken_after_the_build(case):
    data = b"z" * 100
    await case.want(data)
    case.link.lose(NodeLostError("the build is over"))
    with pytest.raises(UsageError, match="not asked for"):
        await case.send(*chunks(data, 100))
    assert await case.send(batch(data)) == [(0, 100)]
    assert not await case.stored(data)
