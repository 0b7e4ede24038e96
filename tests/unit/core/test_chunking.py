"""Pieces of large files join to the file, depend on its bytes only, and stay after a change."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_core import chunking
from offload_core.chunking import Chunker, PieceSizes, piece_sizes
from offload_core.chunklist import MAX_CHUNK_BYTES, MAX_LIST_BYTES, Chunk, is_chunked

MIB = 1 << 20
SIZES = PieceSizes(4096, 1024, 16384)


@pytest.fixture(params=["content", "even"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "even":
        monkeypatch.setattr(chunking, "_compiled", lambda: None)
    return str(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many windows and pieces in a small file."""
    monkeypatch.setattr(chunking, "piece_sizes", lambda _: SIZES)
    monkeypatch.setattr(chunking, "_WINDOW_BYTES", 2 * SIZES.maximum)


def _cut(path: Path, size: int | None = None) -> list[Chunk]:
    fd = os.open(path, os.O_RDONLY)
    try:
        with Chunker() as chunker:
            found = chunker.cut(fd, path.stat().st_size if size is None else size)
    finally:
        os.close(fd)
    assert sum(chunk.size_bytes for chunk in found.chunks) == found.size_bytes
    return found.chunks


def _assert_pieces_of(chunks: list[Chunk], data: bytes, sizes: PieceSizes) -> None:
    at = 0
    for chunk in chunks:
        assert hashlib.sha256(data[at : at + chunk.size_bytes]).digest() == chunk.sha256
        assert 0 < chunk.size_bytes <= sizes.maximum
        at += chunk.size_bytes
    assert at == len(data)


def test_compiled_search_is_there() -> None:
    assert chunking._compiled() is not None


def test_slow_search_is_not_used() -> None:
    code = (
        "import sys; sys.modules['pyfastcdc.cy'] = None; "
        "from offload_core import chunking; print(chunking._compiled())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("size", [0, 1, 64 << 10, 4 * MIB, 4 * MIB + 1, 8 * MIB, 9_000_001])
def test_pieces_join_to_the_file(tmp_path: Path, size: int, kind: str) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    _assert_pieces_of(_cut(tmp_path / "f"), data, piece_sizes(size))


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40_000)), max_size=8), st.integers())
def test_pieces_do_not_depend_on_windows_or_holes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bool, int]], seed: int
) -> None:
    base = tmp_path_factory.mktemp("cut")
    source = random.Random(seed)
    data = b"".join(source.randbytes(n) if filled else bytes(n) for filled, n in parts)
    (base / "full").write_bytes(data)
    with (base / "sparse").open("wb") as file:
        for start in range(0, len(data), 4096):
            if any(block := data[start : start + 4096]):
                file.seek(start)
                file.write(block)
        file.truncate(len(data))
    chunks = _cut(base / "full")
    _assert_pieces_of(chunks, data, SIZES)
    assert _cut(base / "sparse") == chunks
    whole = chunking._cutter(SIZES)(memoryview(data), ended=True)
    assert [chunk.size_bytes for chunk in chunks] == whole


@pytest.mark.parametrize("inserted", [1, 1000, MIB])
def test_most_pieces_stay_when_bytes_are_inserted(tmp_path: Path, inserted: int) -> None:
    data = random.Random(1).randbytes(24 * MIB)
    (tmp_path / "before").write_bytes(data)
    middle = 12 * MIB + 12345
    (tmp_path / "after").write_bytes(data[:middle] + os.urandom(inserted) + data[middle:])
    known = set(_cut(tmp_path / "before"))
    new = [chunk for chunk in _cut(tmp_path / "after") if chunk not in known]
    assert sum(chunk.size_bytes for chunk in new) <= inserted + 2 * MIB


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of all reads."""
    sizes: list[int] = []
    readv = os.readv

    def recording(fd: int, buffers: list[memoryview]) -> int:
        sizes.append(readv(fd, buffers))
        return sizes[-1]

    monkeypatch.setattr(chunking.os, "readv", recording)
    return sizes


def test_holes_are_not_read(tmp_path: Path, reads: list[int]) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(b"start")
        file.truncate(3 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    chunks = _cut(tmp_path / "f")
    assert sum(chunk.size_bytes for chunk in chunks) == (3 << 30) + 3
    assert len(set(chunks)) <= 4
    assert sum(reads) < 32 * MIB


def test_file_that_grew_is_noticed_and_not_read_to_the_end(
    tmp_path: Path, reads: list[int], kind: str
) -> None:
    (tmp_path / "f").write_bytes(bytes(64 * MIB))
    assert sum(chunk.size_bytes for chunk in _cut(tmp_path / "f", 5 * MIB)) > 5 * MIB
    assert sum(reads) < 16 * MIB


@pytest.mark.parametrize("sparse", [False, True])
def test_file_that_shrank_is_noticed(tmp_path: Path, sparse: bool) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(bytes(0 if sparse else 5 * MIB))
        file.truncate(5 * MIB)
    assert sum(chunk.size_bytes for chunk in _cut(tmp_path / "f", 50 * MIB)) == 5 * MIB


def test_file_that_is_truncated_while_it_is_cut_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(20 * MIB))
    readv = os.readv

    def truncating(fd: int, buffers: list[memoryview]) -> int:
        read = readv(fd, buffers)
        os.truncate(tmp_path / "f", 3 * MIB)
        return read

    monkeypatch.setattr(chunking.os, "readv", truncating)
    assert sum(chunk.size_bytes for chunk in _cut(tmp_path / "f", 20 * MIB)) < 20 * MIB


@pytest.mark.parametrize("size", [4 * MIB + 1, 4 << 30, (4 << 30) + 1, 256 << 30, 1 << 40])
def test_lists_of_pieces_fit_into_a_message(size: int) -> None:
    sizes = piece_sizes(size)
    assert is_chunked(size)
    assert sizes.minimum < sizes.average < sizes.maximum <= MAX_CHUNK_BYTES
    # FastCDC's pieces have the size of average and minimum on average.
    assert size / (sizes.average + sizes.minimum) * 36 < MAX_LIST_BYTES * 0.8


def test_a_chunker_cuts_one_file_after_the_other(tmp_path: Path) -> None:
    with Chunker() as chunker:
        for size in (5 * MIB, 6 * MIB, 5 * MIB):
            data = random.Random(size).randbytes(size)
            (tmp_path / "f").write_bytes(data)
            fd = os.open(tmp_path / "f", os.O_RDONLY)
            found = chunker.cut(fd, size)
            os.close(fd)
            _assert_pieces_of(found.chunks, data, piece_sizes(size))
