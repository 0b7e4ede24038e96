"""Blobs on their way: verified, resumed, decompressed, wrapped into tar; and the ledger."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import pytest

from offload_client.bytepipe import BytePipe, stream_through
from offload_client.load import fetch
from offload_client.load.ahead import FetchAhead
from offload_client.load.fetch import small_blob, verified_blob
from offload_client.load.image import Descriptor, Layer
from offload_client.load.ledger import LoadLedger
from offload_client.load.names import parse_image_name
from offload_client.load.progress import LoadMeter, LoadProgress
from offload_client.load.spool import RawLayer, raw_layer
from offload_client.load.tarstream import TarStream
from offload_core.digest import sha256_digest
from offload_core.errors import (
    AccessDeniedError,
    ImageLoadError,
    NodeLostError,
    UsageError,
)
from tests.fixtures.ociimages import Compression, LayerContent, MemorySource, layer, noise_layer


def meter() -> LoadMeter:
    return LoadMeter(lambda _: None)


def stored(source: MemorySource, content: LayerContent) -> Layer:
    source.add_blob(content.blob)
    descriptor = Descriptor(content.media_type, content.digest, len(content.blob))
    diff_id = sha256_digest(content.raw)
    return Layer(descriptor, diff_id, diff_id)


async def collected(source: MemorySource, blob: Descriptor, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in verified_blob(source, blob, meter(), offset)])


def raw(
    source: MemorySource, wanted: Layer, directory: Path | None
) -> AbstractAsyncContextManager[RawLayer]:
    return raw_layer(verified_blob(source, wanted.descriptor, meter()), wanted, directory)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", 0.001)


class TestVerifiedBlob:
    async def test_lost_connection_is_taken_up_again(self) -> None:
        source, content = MemorySource(), noise_layer("x", 900_000)
        blob = stored(source, content).descriptor
        source.break_after[blob.digest] = (300_000, NodeLostError("away"))
        assert await collected(source, blob) == content.blob
        assert source.bytes_taken == len(content.blob)

    async def test_source_that_stays_away_is_an_error(self) -> None:
        source = MemorySource()
        blob = stored(source, noise_layer("x", 9000)).descriptor
        source.broken[blob.digest] = NodeLostError("away")
        with pytest.raises(NodeLostError):
            await collected(source, blob)

    async def test_final_error_is_not_tried_again(self) -> None:
        source = MemorySource()
        blob = stored(source, noise_layer("x", 9000)).descriptor
        source.break_after[blob.digest] = (10, AccessDeniedError("no"))
        with pytest.raises(AccessDeniedError):
            await collected(source, blob)

    async def test_last_piece_is_held_back_from_a_damaged_blob(self) -> None:
        source, content = MemorySource(), noise_layer("x", 900_000)
        blob = stored(source, content).descriptor
        source.damage(blob.digest)
        got = 0
        with pytest.raises(ImageLoadError, match="damaged"):
            async for piece in verified_blob(source, blob, meter()):
                got += len(piece)
        assert 0 < got < len(content.blob)

    @pytest.mark.parametrize("difference", [-1, 1])
    async def test_wrong_size_is_refused(self, difference: int) -> None:
        source, content = MemorySource(), noise_layer("x", 9000)
        blob = stored(source, content).descriptor
        wrong = Descriptor(blob.media_type, blob.digest, blob.size_bytes + difference)
        with pytest.raises(ImageLoadError):
            await collected(source, wrong)

    async def test_offset_brings_the_rest(self) -> None:
        source, content = MemorySource(), noise_layer("x", 900_000)
        blob = stored(source, content).descriptor
        assert await collected(source, blob, 500_000) == content.blob[500_000:]

    async def test_small_blob_has_a_limit(self) -> None:
        source = MemorySource()
        blob = stored(source, noise_layer("x", 9000)).descriptor
        with pytest.raises(ImageLoadError, match="small"):
            await small_blob(source, blob, 100, meter())


class TestFetchAhead:
    async def test_blobs_come_in_order_and_small_ones_before_their_turn(self) -> None:
        source = MemorySource()
        sizes = [2 << 20, *([1000] * 12)]
        contents = [noise_layer(f"n{number}", size) for number, size in enumerate(sizes)]
        blobs = [stored(source, content).descriptor for content in contents]
        async with FetchAhead(source, blobs, meter()) as ahead:
            async with aclosing(ahead.next()) as pieces:
                got = b"".join([piece async for piece in pieces])
                assert got == contents[0].blob
                await asyncio.sleep(0.01)
                assert len(source.taken) == 8
            for content in contents[1:]:
                async with aclosing(ahead.next()) as pieces:
                    assert b"".join([piece async for piece in pieces]) == content.blob

    async def test_error_of_one_ends_the_others(self) -> None:
        source = MemorySource()
        blobs = [stored(source, noise_layer(f"n{n}", 1000)).descriptor for n in range(5)]
        source.broken[blobs[0].digest] = AccessDeniedError("no")
        with pytest.raises(AccessDeniedError):
            async with FetchAhead(source, blobs, meter()) as ahead:
                async for _ in ahead.next():
                    pass
        assert len(asyncio.all_tasks()) == 1


class TestRawLayer:
    @pytest.mark.parametrize("compression", ["zstd", "gzip"])
    async def test_layer_is_decompressed_and_nothing_is_left(
        self, compression: Compression, tmp_path: Path
    ) -> None:
        source, content = MemorySource(), layer({"a": bytes(5_000_000)}, compression)
        async with raw(source, stored(source, content), tmp_path) as unpacked:
            assert unpacked.size_bytes == len(content.raw)
            assert b"".join([piece async for piece in unpacked.content]) == content.raw
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("compression", ["zstd", "gzip"])
    async def test_content_that_is_not_the_diff_is_refused(
        self, compression: Compression, tmp_path: Path
    ) -> None:
        source = MemorySource()
        wanted = stored(source, layer({"a": b"1"}, compression))
        other = Layer(wanted.descriptor, sha256_digest(b"other"), "")
        with pytest.raises(ImageLoadError, match="cannot be unpacked"):
            async with raw(source, other, tmp_path):
                pass
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["zstd", "gzip"])
    async def test_rubbish_is_refused(self, kind: str) -> None:
        source = MemorySource()
        content = LayerContent(b"", b"no layer at all" * 99, f"x.tar+{kind}")
        with pytest.raises(ImageLoadError, match="cannot be unpacked"):
            async with raw(source, stored(source, content), None):
                pass

    async def test_directory_that_is_missing_is_named(self, tmp_path: Path) -> None:
        source = MemorySource()
        wanted = stored(source, layer({"a": b"1"}))
        with pytest.raises(ImageLoadError, match="temporary file") as caught:
            async with raw(source, wanted, tmp_path / "gone"):
                pass
        assert "TMPDIR" in caught.value.hint


class TestTarStream:
    async def test_archive_is_readable(self) -> None:
        async def content() -> AsyncIterator[bytes]:
            yield b"abc" * 1000
            yield b"d"

        async def produce(pipe: BytePipe) -> None:
            tar = TarStream(pipe)
            await tar.add("small", b"x")
            await tar.add("exact", bytes(512))
            await tar.add_stream("blobs/" + "n" * 120, 3001, content())
            await tar.finish()

        data = await stream_through(produce, lambda pipe: pipe.read(), name="test")
        assert len(data) % 512 == 0
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            sizes = {member.name: member.size for member in archive}
        assert sizes == {"small": 1, "exact": 512, "blobs/" + "n" * 120: 3001}

    @pytest.mark.parametrize("size", [2, 4])
    async def test_wrong_size_is_an_error(self, size: int) -> None:
        async def content() -> AsyncIterator[bytes]:
            yield b"abc"

        async def produce(pipe: BytePipe) -> None:
            await TarStream(pipe).add_stream("a", size, content())

        with pytest.raises(ValueError, match="a is"):
            await stream_through(produce, lambda pipe: pipe.read(), name="test")


class TestLedger:
    def test_notes_count_while_the_image_is_listed(self, tmp_path: Path) -> None:
        ledger = LoadLedger.for_user({"XDG_CACHE_HOME": str(tmp_path)})
        assert ledger.blobs("engine", ["a"]) == set()
        ledger.note("engine", "a", {"one", "two"})
        ledger.note("engine", "b", {"two", "three"})
        ledger.note("other", "a", {"four"})
        assert ledger.blobs("engine", ["a", "b", "c"]) == {"one", "two", "three"}
        assert ledger.blobs("engine", ["b"]) == {"two", "three"}
        assert [path.name for path in (tmp_path / "offload-build").iterdir()] == ["loaded.json"]

    def test_old_notes_are_dropped(self, tmp_path: Path) -> None:
        ledger = LoadLedger(tmp_path / "l")
        for number in range(210):
            ledger.note("engine", f"i{number}", ["d"])
        assert ledger.blobs("engine", ["i5"]) == set()
        assert ledger.blobs("engine", ["i209"]) == {"d"}

    @pytest.mark.parametrize("content", [b"", b"[1]", b'{"e": 5}', b"\xff"])
    def test_damaged_file_is_empty_and_mended(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "l"
        path.write_bytes(content)
        ledger = LoadLedger(path)
        assert ledger.blobs("e", ["a"]) == set()
        ledger.note("e", "a", ["d"])
        assert ledger.blobs("e", ["a"]) == {"d"}

    def test_unwritable_place_breaks_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        ledger = LoadLedger(tmp_path / "file" / "l")
        ledger.note("e", "a", ["d"])
        assert ledger.blobs("e", ["a"]) == set()


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("app", "docker.io/library/app:latest"),
        ("team/app:1", "docker.io/team/app:1"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
    ],
)
def test_names_become_full(text: str, full: str) -> None:
    assert str(parse_image_name(text)) == full


def test_wrong_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        parse_image_name("App@sha256:1")


async def test_progress_shows_each_phase_and_not_each_piece() -> None:
    seen: list[LoadProgress] = []
    counted = LoadMeter(seen.append)
    counted.enter("checking")
    counted.expect(1000 * 10, layers=1)
    counted.enter("receiving")
    for _ in range(1000):
        counted.received(10)
    counted.layer_received()
    await asyncio.sleep(0)
    counted.enter("unpacking")
    counted.enter("unpacking")
    assert [moment.phase for moment in seen if moment.phase != "receiving"] == [
        "checking",
        "unpacking",
    ]
    assert len(seen) < 10
    assert seen[-1] == LoadProgress("unpacking", 10_000, 10_000, 1, 1)
