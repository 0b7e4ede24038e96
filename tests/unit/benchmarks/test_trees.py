from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import zstandard

from benchmarks.trees import (
    Keystream,
    Text,
    change_middle,
    clone,
    write_equal_files,
    write_noise,
    write_tree,
)

FILES, SIZE = 200, 1_000_000


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "Dockerfile"
    }


def tree(folder: Path, variant: str) -> dict[str, bytes]:
    return content(
        write_tree(folder, files=FILES, size_bytes=SIZE, variant=variant, binary_every=10)
    )


def test_tree_has_the_files_and_bytes_asked_for_and_can_be_made_again(tmp_path: Path) -> None:
    first = tree(tmp_path / "a", "x")
    assert len(first) == FILES
    assert sum(map(len, first.values())) == SIZE
    assert first == tree(tmp_path / "b", "x")


def test_variants_have_equal_paths_and_sizes_and_no_file_in_common(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "a", "x"), tree(tmp_path / "b", "y")
    assert {name: len(data) for name, data in first.items()} == {
        name: len(data) for name, data in second.items()
    }
    assert set(first.values()).isdisjoint(second.values())


def test_variants_are_as_compressible_as_source_code() -> None:
    compressor = zstandard.ZstdCompressor(level=1)
    data = [Text(variant).read(4_000_000) for variant in ("x", "y")]
    batches = [len(compressor.compress(text[:1_000_000])) for text in data]
    assert batches[0] == pytest.approx(batches[1], rel=0.02)
    assert 3.3 < 1_000_000 / batches[0] < 3.8
    files = [len(compressor.compress(data[0][at : at + 5000])) for at in range(0, 1_000_000, 5000)]
    assert 2.6 < 1_000_000 / sum(files) < 3.0


def test_text_that_goes_round_is_another_one() -> None:
    text = Text("x")
    first = text.read(40_000_000)
    assert len(first) == 40_000_000
    assert first[:1000] not in first[30_000_000:]


def test_equal_files_all_differ(tmp_path: Path) -> None:
    found = content(write_equal_files(tmp_path / "a", files=100, file_bytes=512, variant="x"))
    assert {len(data) for data in found.values()} == {512}
    assert len({hashlib.sha256(data).digest() for data in found.values()}) == 100


def test_noise_does_not_compress_and_can_be_made_again(tmp_path: Path) -> None:
    found = content(write_noise(tmp_path / "a", {"big": 5_000_000, "small": 10}, variant="x"))
    assert found["big"] + found["small"] == Keystream("x").read(5_000_010)
    assert len(zstandard.compress(found["big"])) >= 5_000_000
    assert Keystream("y").read(100) != found["big"][:100]


def test_middle_of_a_file_is_replaced_or_moved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    change_middle(path, b"ab", insert=False)
    assert path.read_bytes() == b"01234ab789"
    change_middle(path, b"cd", insert=True)
    assert path.read_bytes() == b"01234cdab789"


@pytest.mark.parametrize("keep", [True, False])
def test_clone_keeps_times_or_makes_new_ones(tmp_path: Path, keep: bool) -> None:
    write_noise(tmp_path / "a", {"file": 10}, variant="x")
    times = [path.stat().st_mtime_ns for path in (tmp_path / "a" / "file",)]
    copy = clone(tmp_path / "a", tmp_path / "deep" / "b", keep_times=keep)
    assert content(copy) == content(tmp_path / "a")
    assert ([(copy / "file").stat().st_mtime_ns] == times) is keep
