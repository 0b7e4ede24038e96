"""What arrives in an upload is verified before anybody sees it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
import structlog
import zstandard

from offload_core.errors import ContextChangedError, InternalError, UsageError
from offload_proto.v1.node_service_pb2 import BlobBatch, UploadRequest
from tests.fixtures.contentclients import Project, batch, sha

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def project(tmp_path: Path) -> AsyncIterator[Project]:
    async with Project(tmp_path / "context") as opened:
        yield opened


@pytest.mark.parametrize("zstd", [False, True])
async def test_batch_is_stored_announced_and_counted(project, zstd):
    client = project.client(b"one" * 100, b"two" * 100)
    reading = asyncio.ensure_future(client.read_all())
    assert await client.questions() == client.files
    sent = batch(*client.files, zstd=zstd)
    assert await client.upload(sent) == [(2, 600)]
    assert await reading == client.files
    assert await project.missing(*client.files) == []
    assert client.stats.context_sent_bytes == 600
    assert client.stats.context_wire_bytes == len(sent.batch.data)
    assert (client.stats.context_wire_bytes < 600) is zstd


async def test_one_answer_per_request_in_order(project):
    client = project.client(b"a", b"bb", b"ccc")
    await client.content.request(client.wanted())
    requests = [batch(b"a"), batch(b"bb", b"ccc"), batch()]
    assert await client.upload(*requests) == [(1, 1), (2, 5), (0, 0)]


async def test_content_that_was_never_asked_for_ends_the_build(project):
    client = project.client(b"one")
    await client.content.request(client.wanted())
    with pytest.raises(UsageError, match="not asked for"):
        await client.upload(batch(b"one", b"unasked"))
    assert len(await project.missing(b"one", b"unasked")) == 2
    with pytest.raises(UsageError, match="not asked for"):
        await client.read(client.wanted()[0])


async def test_content_that_has_come_in_another_way_is_taken_silently(project):
    client = project.client(b"one")
    await client.content.request(client.wanted())
    assert await client.upload(batch(b"one"), batch(b"one")) == [(1, 3), (1, 3)]


async def test_wrong_content_fails_only_its_file_and_is_counted_and_logged(project):
    client = project.client(b"good", b"other")
    files = client.wanted()
    await client.content.request(files)
    with structlog.testing.capture_logs() as logs:
        answer = await client.upload(
            batch(b"evil", b"other", digests=[sha(b"good"), sha(b"other")])
        )
    assert answer == [(1, 5)]
    assert [entry["event"] for entry in logs] == ["context.blob.refused"]
    assert client.stats.context_refused_blobs == 1
    assert client.stats.context_sent_bytes == 5
    assert await client.read(files[1]) == b"other"
    with pytest.raises(ContextChangedError, match=r'^"dir/file0" of the build context changed'):
        await client.read(files[0])
    assert await project.missing(b"good") == [sha(b"good")]


async def test_nothing_is_taken_after_the_build(project):
    client = project.client(b"late")
    await client.content.request(client.wanted())
    await client.leave()
    assert await client.upload(batch(b"late")) == [(0, 0)]
    assert await project.missing(b"late") == [sha(b"late")]


def message(**values: object) -> UploadRequest:
    return UploadRequest(batch=BlobBatch(**values))


def bomb(unpacked: int) -> bytes:
    return zstandard.compress(bytes(unpacked))


A = sha(b"a")
HOSTILE = {
    "no sizes": (message(sha256=[A], data=b"a"), "malformed"),
    "negative size": (message(sha256=[A], sizes=[-1], data=b"a"), "malformed"),
    "short digest": (message(sha256=[b"x"], sizes=[1], data=b"a"), "malformed"),
    "sizes beyond the data": (message(sha256=[A], sizes=[2**60], data=b"a"), "add up"),
    "data beyond the sizes": (message(sha256=[A], sizes=[1], data=b"aa"), "add up"),
    "not zstd": (message(sha256=[A], sizes=[1], data=b"a", zstd=True), "damaged"),
    "half a frame": (message(sha256=[A], sizes=[1], data=bomb(1)[:-1], zstd=True), "damaged"),
    "more than a frame": (
        message(sha256=[A], sizes=[1], data=zstandard.compress(b"a") + b"x", zstd=True),
        "damaged",
    ),
    "zip bomb that says so": (
        message(sha256=[A], sizes=[1 << 30], data=bomb(1 << 30), zstd=True),
        "add up",
    ),
    "zip bomb that does not": (
        message(sha256=[A], sizes=[1], data=bomb(64 << 20), zstd=True),
        "add up",
    ),
    "frame without its size": (
        message(
            sha256=[A],
            sizes=[1],
            data=zstandard.ZstdCompressor(write_content_size=False).compress(b"a"),
            zstd=True,
        ),
        "add up",
    ),
    "frame of another size than it says": (
        message(sha256=[A], sizes=[1], data=bomb(1)[:5] + bomb(900)[6:], zstd=True),
        "(damaged|add up)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_batch_ends_its_build_with_a_sentence(project, case):
    request, sentence = HOSTILE[case]
    client = project.client(b"a")
    await client.content.request(client.wanted())
    with pytest.raises(UsageError, match=sentence):
        await client.upload(request)
    with pytest.raises(UsageError, match=sentence):
        await client.read(client.wanted()[0])
    assert await project.missing(b"a") == [A]


async def test_many_streams_of_one_build_store_the_same_tree_together(project):
    client = project.client(*(os.urandom(3000) for _ in range(200)))
    await client.content.request(client.wanted())
    parts = [client.files[start::4] for start in range(4)]
    await asyncio.gather(
        *(client.upload(*(batch(*part[at : at + 10]) for at in range(0, 50, 10))) for part in parts)
    )
    assert await client.read_all() == client.files
    assert client.stats.context_sent_bytes == 600_000


async def test_fault_of_the_node_ends_the_build_and_not_only_the_upload(project, monkeypatch):
    monkeypatch.setattr("offload_builder.node.uploads.DISCARD_SECONDS", 0.05)
    monkeypatch.setattr(project.store, "put_many_sync", None)
    client = project.client(b"one")
    await client.content.request(client.wanted())
    with pytest.raises(InternalError):
        await client.upload(batch(b"one"))
    with pytest.raises(InternalError, match="could not take"):
        await client.read(client.wanted()[0])
