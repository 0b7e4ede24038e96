"""Content of a build's local sources: found, asked for once, handed on as it arrives."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_builder.node.blobplaces import NUMBERS_PER_MESSAGE, place_of, requests
from offload_core.chunklist import Chunk, encode_chunks
from offload_core.errors import ContextChangedError, NodeLostError, QuotaExceededError, UsageError
from offload_proto.v1.node_service_pb2 import BlobFailure
from tests.fixtures.contentclients import Client, LargeFile, Project, batch, sha

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20


@pytest.fixture
async def project(tmp_path: Path) -> AsyncIterator[Project]:
    async with Project(tmp_path / "context") as opened:
        yield opened


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0.001)


def large(count: int = 6, size: int = MIB) -> LargeFile:
    return LargeFile.of(os.urandom(count * size), size)


def whole(file: LargeFile) -> bytes:
    return b"".join(map(file.piece, range(len(file.pieces))))


async def test_files_of_all_sizes_come_from_the_client_once_and_then_from_the_disk(project):
    contents = [b"s", os.urandom(300 << 10), os.urandom(3 * MIB), large(), b"s"]
    expected = [item if isinstance(item, bytes) else whole(item) for item in contents]
    first = project.client(*contents, answers=True)
    assert await first.read_all() == expected
    # The fifth has the content of the first.
    assert first.asked == [0, 1, 2, 3, *((3, piece) for piece in range(6))]
    again = project.client(*contents, answers=True)
    assert await again.read_all() == expected
    assert again.asked == []
    assert again.stats.context_sent_bytes == 0


async def test_readers_that_rest_half_way_hold_up_nobody(project):
    contents = [os.urandom(3 * MIB) for _ in range(12)] + [large(3, 2 * MIB)]
    await project.client(*contents, answers=True).read_all()
    client = project.client(*contents)
    files = client.wanted()
    await client.content.request(files)
    readers = [client.content.read(file) for file in files for _ in range(2)]
    for reader in readers:
        assert len(bytes(await anext(reader))) == MIB
    assert await client.read(files[0]) == contents[0]
    for reader in readers:
        await reader.aclose()


async def test_file_may_be_read_again_in_the_same_build(project):
    client = project.client(b"x" * 1000, large(), answers=True)
    assert await client.read_all() == await client.read_all()
    assert len(client.asked) == 8


async def test_only_missing_pieces_of_a_large_file_are_asked_for(project):
    old = large(8)
    await project.client(old, answers=True).read_all()
    pieces = [old.piece(number) for number in range(8)]
    pieces[3] = os.urandom(MIB + 5)
    new = LargeFile([Chunk(sha(piece), len(piece)) for piece in pieces], pieces.__getitem__)
    client = project.client(new, answers=True)
    assert await client.read_all() == [b"".join(pieces)]
    assert client.asked == [0, (0, 3)]


async def test_equal_pieces_are_asked_for_once(project):
    same = LargeFile.of(bytes(10 * MIB), MIB)
    client = project.client(same, answers=True)
    assert await client.read_all() == [bytes(10 * MIB)]
    assert client.asked == [0, (0, 0)]


async def test_large_file_is_handed_on_before_its_end_has_arrived(project):
    file = large(5, MIB + 7)
    client = project.client(file)
    wanted = client.wanted()
    await client.content.request(wanted)
    await client.upload(batch(*await client.questions()))
    pieces = await client.questions()
    parts = client.content.read(wanted[0])
    for number, piece in enumerate(pieces):
        coming = asyncio.ensure_future(anext(parts))
        await turns(10)
        assert not coming.done()
        await client.upload(batch(piece))
        got = bytes(await coming)
        while len(got) < len(piece):
            got += bytes(await anext(parts))
        assert got == file.piece(number)
    assert await anext(parts, None) is None


async def test_memory_does_not_grow_with_the_pieces_of_a_file(project, monkeypatch):
    count, size = 5_000, 1024

    def piece(number: int) -> bytes:
        return number.to_bytes(4) * (size // 4)

    file = LargeFile([Chunk(sha(piece(number)), size) for number in range(count)], piece)
    client = project.client(file, answers=True)
    wanted = client.wanted()
    await client.content.request(wanted)
    tracemalloc.start()
    try:
        read = 0
        most_pending = 0
        async for part in client.content.read(wanted[0]):
            assert bytes(part) == piece(read)
            read += 1
            most_pending = max(most_pending, client.content.blobs.pending_pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == count
    assert most_pending <= 2048
    # Leases and the tests' own list of questions grow by some 100 bytes a piece.
    assert peak < 8 * MIB


async def test_five_builds_of_one_tree_receive_it_once(project):
    contents = [os.urandom(5000) for _ in range(300)] + [large()]
    expected = [item if isinstance(item, bytes) else whole(item) for item in contents]
    clients = [project.client(*contents, answers=True) for _ in range(5)]
    for found in await asyncio.gather(*(client.read_all() for client in clients)):
        assert found == expected
    sent = sum(client.stats.context_sent_bytes for client in clients)
    assert sent == sum(map(len, expected)) + len(contents[-1].chunk_list)


async def test_build_that_waits_takes_over_when_the_other_ends(project):
    contents = [os.urandom(1000) for _ in range(5)]
    first = project.client(*contents)
    await first.content.request(first.wanted())
    second = project.client(*contents, answers=True)
    reading = asyncio.ensure_future(second.read_all())
    await turns()
    assert second.asked == []
    await first.upload(batch(contents[0]))
    await first.leave()
    assert await reading == contents
    assert second.asked == [1, 2, 3, 4]


async def test_build_that_ends_while_it_looks_hands_its_claims_on(project):
    first, second = (project.client(b"one", b"two", answers=True) for _ in range(2))
    asking = asyncio.ensure_future(first.content.request(first.wanted()))
    reading = asyncio.ensure_future(second.read_all())
    await asyncio.sleep(0)
    await first.leave()
    assert await reading == [b"one", b"two"]
    await asking


async def test_request_that_is_cancelled_is_carried_out_all_the_same(project):
    client = project.client(b"one", answers=True)
    asking = asyncio.ensure_future(client.content.request(client.wanted()))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait((asking,))
    assert await client.read_all() == [b"one"]


async def test_wrong_content_from_one_client_fails_only_its_build(project):
    liar = project.client(b"good")
    await liar.content.request(liar.wanted())
    honest = project.client(b"good", answers=True)
    reading = asyncio.ensure_future(honest.read_all())
    await turns()
    await liar.upload(batch(b"evil", digests=[sha(b"good")]))
    assert await reading == [b"good"]
    with pytest.raises(ContextChangedError, match="dir/file0"):
        await liar.read(liar.wanted()[0])


async def test_wrong_piece_ends_the_reading_at_the_piece(project):
    file = large()
    client = project.client(file)
    wanted = client.wanted()[0]
    await client.content.request([wanted])
    await client.upload(batch(*await client.questions()))
    pieces = await client.questions()
    pieces[2] = b"?" * MIB
    await client.upload(
        *(
            batch(piece, digests=[chunk.sha256])
            for piece, chunk in zip(pieces, file.pieces, strict=True)
        )
    )
    got = b""
    with pytest.raises(ContextChangedError, match="dir/file0"):
        async for part in client.content.read(wanted):
            got += bytes(part)
    assert got == whole(file)[: 2 * MIB]


async def test_failure_of_the_client_names_the_file_and_fails_only_it(project):
    client = project.client(b"one", b"two", large())
    files = client.wanted()
    await client.content.request(files)
    await client.upload(batch(b"two"))
    client.content.blob_failure(BlobFailure(request_id=1, entry=0, message="one is gone"))
    client.content.blob_failure(BlobFailure(request_id=1, entry=2, message="big is gone"))
    client.content.blob_failure(BlobFailure(request_id=7, entry=1, message="unknown"))
    assert await client.read(files[1]) == b"two"
    for file, sentence in ((files[0], "one is gone"), (files[2], "big is gone")):
        with pytest.raises(ContextChangedError, match=sentence):
            await client.read(file)


async def test_client_that_can_deliver_nothing_is_not_asked_for_each_file(project):
    client = project.client(*(b"%d" % number for number in range(100)))
    files = client.wanted()
    await client.content.request(files)
    for entry in range(20):
        client.content.blob_failure(BlobFailure(request_id=1, entry=entry, message=f"no {entry}"))
    with pytest.raises(ContextChangedError, match="no 16"):
        await client.read(files[99])


async def test_lost_client_ends_what_waits_and_what_is_stored_stays_readable(project):
    client = project.client(b"here", b"missing")
    files = client.wanted()
    await client.content.request(files)
    await client.upload(batch(b"here"))
    reading = asyncio.ensure_future(client.read(files[1]))
    await turns(5)
    client.link.lose(NodeLostError("gone"))
    client.content.lose(NodeLostError("gone"))
    with pytest.raises(NodeLostError, match="gone"):
        await reading
    assert await client.read(files[0]) == b"here"
    # The retry finds what has come.
    retry = project.client(b"here", b"missing", answers=True)
    assert await retry.read_all() == [b"here", b"missing"]
    assert retry.asked == [1]


async def test_build_without_its_client_reads_what_the_project_has(project):
    await project.client(b"known", answers=True).read_all()
    client = project.client(b"known", b"unknown")
    client.link.lose(NodeLostError("gone"))
    client.content.lose(NodeLostError("gone"))
    known, unknown = client.wanted()
    await client.content.request([known, unknown])
    assert await client.read(known) == b"known"
    with pytest.raises(NodeLostError, match="gone"):
        await client.read(unknown)


async def test_silent_client_ends_the_reading(project):
    client = project.client(b"never")
    client.link._silence_seconds = 0.1
    with pytest.raises(Exception, match="was silent"):
        await client.read_all()


def damage(project: Project, old: bytes, new: bytes) -> None:
    """Make the disk return other bytes for a blob; a small one keeps its size."""
    path = Path(project.store.path(sha(old)))
    if path.exists():
        path.write_bytes(new)
        return
    for segment in project.store._root.glob("small/*.seg"):
        segment.write_bytes(segment.read_bytes().replace(old, new))


async def test_damaged_file_on_the_disk_is_fetched_again(project):
    contents = [os.urandom(100_000), b"flip" * 10, os.urandom(2 * MIB), large()]
    expected = [item if isinstance(item, bytes) else whole(item) for item in contents]
    await project.client(*contents, answers=True).read_all()
    damage(project, contents[0], bytes(100_000))
    damage(project, contents[1], b"?lip" * 10)
    damage(project, contents[2], b"?" * (2 * MIB))
    damage(project, contents[3].piece(4), b"?" * MIB)
    client = project.client(*contents, answers=True)
    assert await client.read_all() == expected
    # Files are verified side by side: which is found first is not said.
    assert sorted(client.asked, key=str) == [(3, 4), 0, 1, 2]
    last = project.client(*contents, answers=True)
    assert await last.read_all() == expected
    assert last.asked == []


async def test_damaged_chunk_list_on_the_disk_is_fetched_again(project):
    file = large()
    await project.client(file, answers=True).read_all()
    damage(project, file.chunk_list, file.chunk_list[:-36] + bytes(36))
    client = project.client(file, answers=True)
    assert await client.read_all() == [whole(file)]
    assert client.asked == [0]


async def test_damaged_file_of_a_client_that_is_gone_is_an_error(project):
    await project.client(b"data", answers=True).read_all()
    damage(project, b"data", b"dat?")
    client = project.client(b"data")
    client.link.lose(NodeLostError("gone"))
    client.content.lose(NodeLostError("gone"))
    with pytest.raises(NodeLostError, match="gone"):
        await client.read_all()


async def test_chunk_list_that_does_not_fit_its_file_is_refused(project):
    good = large()
    for data in (
        good.chunk_list[:-1],
        good.chunk_list[:-36],
        encode_chunks([Chunk(bytes(32), 5 * MIB)]),
        encode_chunks([*good.pieces, Chunk(bytes(32), 0)]),
    ):
        client = project.client(good)
        wanted = client.wanted()[0]._replace(sha256=sha(data))
        await client.content.request([wanted])
        await client.upload(batch(data))
        with pytest.raises(UsageError, match="chunk list"):
            await client.read(wanted)


async def test_size_that_is_not_that_of_the_content_is_refused(project):
    await project.client(b"12345", answers=True).read_all()
    liar = project.client(b"12345", answers=True)
    wanted = liar.wanted()[0]._replace(size_bytes=4)
    with pytest.raises(UsageError, match="size that it does not have"):
        await liar.read_all([wanted])
    fresh = project.client(b"abc", answers=True)
    wanted = fresh.wanted()[0]._replace(size_bytes=4)
    with pytest.raises(UsageError, match="size that it does not have"):
        await fresh.read_all([wanted])
    assert await project.missing(b"12345", b"abc") == []


async def test_full_disk_ends_the_build_and_the_other_ones_that_wait(project, monkeypatch):
    def full(blobs: object) -> None:
        raise QuotaExceededError("the disk of the node is full")

    first, second = (project.client(b"data", answers=True) for _ in range(2))
    monkeypatch.setattr(project.store, "put_many_sync", full)
    monkeypatch.setattr("offload_builder.node.uploads.DISCARD_SECONDS", 0.05)
    readings = [asyncio.ensure_future(client.read_all()) for client in (first, second)]
    for reading in readings:
        with pytest.raises(QuotaExceededError, match="disk of the node is full"):
            await reading


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(-1, 4)), max_size=60))
def test_questions_name_each_place_once_and_are_bounded(wanted):
    places = sorted({place_of(*item) for item in wanted})
    found = []
    for message in requests(places):
        found += [place_of(message.request_id, entry) for entry in message.entries]
        for chunks in message.chunks:
            found += [place_of(message.request_id, chunks.entry, chunk) for chunk in chunks.chunks]
    assert sorted(found) == places


def test_questions_are_split():
    counts = [
        len(message.entries) + sum(len(item.chunks) for item in message.chunks)
        for message in requests(
            [place_of(1, number) for number in range(15_000)]
            + [place_of(1, 7, number) for number in range(15_000)]
        )
    ]
    assert counts == [NUMBERS_PER_MESSAGE] * 3


async def act(client: Client, action: str, entry: int) -> None:
    data = client.files[entry]
    assert isinstance(data, bytes)
    if action == "fail":
        client.content.blob_failure(BlobFailure(request_id=1, entry=entry, message="gone"))
    elif action == "lose":
        client.link.lose(NodeLostError("lost"))
        client.content.lose(NodeLostError("lost"))
    elif action == "leave":
        await client.leave()
    elif client.content.blobs.asked(sha(data)):
        await client.upload(batch(data if action == "send" else b"?", digests=[sha(data)]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_builds_that_come_fail_and_leave_in_any_order_all_end(tmp_path_factory, data):
    """Every reader gets the right bytes or an error, and what is on its way is asked of one."""
    contents = [b"%d" % number * 50 for number in range(6)]

    def asked_of(clients: list[Client], content: bytes) -> int:
        blobs = [client.content.blobs for client in clients]
        return sum(item.is_pending(sha(content)) and item.asked(sha(content)) for item in blobs)

    async def run() -> None:
        async with Project(tmp_path_factory.mktemp("context")) as project:
            clients = [project.client(*contents) for _ in range(4)]
            readings = [
                asyncio.ensure_future(client.read_all([file]))
                for client in clients
                for file in client.wanted()
            ]
            for _ in range(data.draw(st.integers(0, 20))):
                client = data.draw(st.sampled_from(clients))
                action = data.draw(st.sampled_from(["send", "lie", "fail", "lose", "leave"]))
                entry = data.draw(st.integers(0, 5))
                await turns(2)
                if not client.content.blobs.closed:
                    await act(client, action, entry)
                assert all(asked_of(clients, content) <= 1 for content in contents)
            for client in clients:
                await client.leave()
            results = await asyncio.gather(*readings, return_exceptions=True)
            for number, result in enumerate(results):
                if isinstance(result, BaseException):
                    assert isinstance(result, (ContextChangedError, NodeLostError)), result
                else:
                    assert result == [contents[number % 6]]

    asyncio.run(run())
