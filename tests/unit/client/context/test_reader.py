"""Reading delivers what was listed, or says which file changed and how."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from offload_client.context import digests, reader
from offload_client.context.entries import tree_entries
from offload_client.context.source import DirectorySource, ListedContent, Selection
from offload_core import filedigest
from offload_core.chunklist import CHUNKED_ABOVE_BYTES, decode_chunks, offsets
from offload_core.errors import ContextChangedError, ContextError

LARGE = CHUNKED_ABOVE_BYTES + 100_000


def _listed(source: DirectorySource) -> dict[str, ListedContent]:
    return {
        entry.path: ListedContent(entry.path, entry.size_bytes, entry.sha256, entry.modified_at_ns)
        for entry in tree_entries(source.scan(Selection(), warn=print))
        if entry.sha256 is not None
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "d" / "e").mkdir(parents=True)
    (root / "d" / "e" / "f").write_bytes(b"0123456789")
    (root / "large").write_bytes(os.urandom(LARGE))
    for path in (root / "d" / "e" / "f", root / "large"):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    return root


@pytest.fixture
def source(root: Path) -> DirectorySource:
    return DirectorySource(root, index_path=None)


def test_small_files_are_read_whole(root: Path, source: DirectorySource) -> None:
    (root / "d" / "other").write_bytes(b"other")
    listed = _listed(source)
    with source.open() as files:
        assert files.read(listed["d/e/f"]) == b"0123456789"
        assert files.read(listed["d/other"]) == b"other"


def test_pieces_of_the_chunk_list_join_to_the_file(root: Path, source: DirectorySource) -> None:
    file = _listed(source)["large"]
    with source.open() as files:
        data = files.chunk_list(file)
        assert hashlib.sha256(data).digest() == file.sha256
        chunks = decode_chunks(data, LARGE)
        found = b""
        for chunk, offset in zip(chunks, offsets(chunks), strict=True):
            piece = files.read_chunk(file, offset, chunk.size_bytes)
            assert hashlib.sha256(piece).digest() == chunk.sha256
            found += piece
    assert found == (root / "large").read_bytes()


def _rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"+")


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _to_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (_rewrite, "it was written"),
    (_grow, "grew"),
    (_shrink, "shrank"),
    (Path.unlink, "gone"),
    (_to_link, "symbolic link"),
    (_to_pipe, "no regular file"),
    (_to_directory, "no regular file"),
]


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_changed_small_file_is_named(
    root: Path, source: DirectorySource, change: Callable[[Path], None], what: str
) -> None:
    file = _listed(source)["d/e/f"]
    change(root / "d" / "e" / "f")
    with source.open() as files, pytest.raises(ContextChangedError, match=f'"d/e/f".*{what}'):
        files.read(file)


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_changed_large_file_is_named(
    root: Path, source: DirectorySource, change: Callable[[Path], None], what: str
) -> None:
    file = _listed(source)["large"]
    change(root / "large")
    with source.open() as files, pytest.raises(ContextChangedError, match=f'"large".*{what}'):
        files.read_chunk(file, 0, 1000)


@pytest.mark.parametrize(
    ("change", "what"), [(_rewrite, "it was written"), (_grow, "grew"), (_shrink, "shrank")]
)
def test_large_file_that_changes_between_pieces_is_named(
    root: Path, source: DirectorySource, change: Callable[[Path], None], what: str
) -> None:
    file = _listed(source)["large"]
    with source.open() as files:
        files.read_chunk(file, 0, 1000)
        change(root / "large")
        with pytest.raises(ContextChangedError, match=f'"large".*{what}'):
            files.read_chunk(file, 1000, 1000)


def test_replaced_large_file_is_read_to_its_end_as_it_was(
    root: Path, source: DirectorySource
) -> None:
    before = (root / "large").read_bytes()
    file = _listed(source)["large"]
    with source.open() as files:
        first = files.read_chunk(file, 0, 1000)
        (root / "new").write_bytes(bytes(LARGE))
        (root / "new").replace(root / "large")
        assert first + files.read_chunk(file, 1000, LARGE - 1000) == before


@pytest.mark.parametrize("change", [_rewrite, _grow, _shrink])
def test_small_file_that_changes_while_it_is_read_is_named(
    root: Path,
    source: DirectorySource,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _listed(source)["d/e/f"]
    read_whole = filedigest.read_whole

    def disturbed(fd: int, size: int) -> bytes:
        data = read_whole(fd, size)
        change(root / "d" / "e" / "f")
        return data

    monkeypatch.setattr(reader, "read_whole", disturbed)
    with source.open() as files, pytest.raises(ContextChangedError, match='"d/e/f"'):
        files.read(file)


def test_link_in_place_of_a_directory_is_not_followed(root: Path, source: DirectorySource) -> None:
    file = _listed(source)["d/e/f"]
    (root / "d").rename(root / "moved")
    (root / "d").symlink_to("moved")
    with source.open() as files, pytest.raises(ContextChangedError, match="symbolic link"):
        files.read(file)


def test_path_that_leaves_the_root_is_not_read(root: Path, source: DirectorySource) -> None:
    (root.parent / "secret").write_bytes(b"secret")
    (root / "out").symlink_to("..")
    with source.open() as files, pytest.raises(ContextChangedError, match="symbolic link"):
        files.read(ListedContent("out/secret", 6, bytes(32), 0))


def test_root_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="gone"):
        DirectorySource(tmp_path / "gone", index_path=None).open()


def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**12))


@pytest.fixture
def cut_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files that were cut."""
    sizes: list[int] = []
    cut = reader.Chunker.cut

    def recording(self: reader.Chunker, fd: int, size: int):  # type: ignore[no-untyped-def]
        sizes.append(size)
        return cut(self, fd, size)

    monkeypatch.setattr(reader.Chunker, "cut", recording)
    return sizes


def test_chunk_list_of_this_scan_needs_no_reading(
    source: DirectorySource, cut_files: list[int]
) -> None:
    file = _listed(source)["large"]
    with source.open() as files:
        files.chunk_list(file)
    assert cut_files == [LARGE]


def test_chunk_list_of_an_earlier_scan_comes_from_the_index(
    root: Path, tmp_path: Path, cut_files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    index_path = tmp_path / "index.db"
    first = _listed(DirectorySource(root, index_path=index_path))
    second = DirectorySource(root, index_path=index_path)
    assert _listed(second) == first
    with second.open() as files:
        data = files.chunk_list(first["large"])
    assert hashlib.sha256(data).digest() == first["large"].sha256
    assert cut_files == [LARGE]


def test_unknown_chunk_list_is_made_again(root: Path, source: DirectorySource) -> None:
    file = _listed(source)["large"]
    with DirectorySource(root, index_path=None).open() as files:
        data = files.chunk_list(file)
    assert hashlib.sha256(data).digest() == file.sha256


def test_chunk_list_of_other_content_is_refused(root: Path, source: DirectorySource) -> None:
    file = _listed(source)["large"]
    _rewrite(root / "large")
    os.utime(root / "large", ns=(0, file.modified_at_ns))
    other = DirectorySource(root, index_path=None)
    with other.open() as files, pytest.raises(ContextChangedError, match=r'"large".*another'):
        files.chunk_list(file)


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_stays_open(root: Path, tmp_path: Path, source: DirectorySource) -> None:
    listed = _listed(source)
    descriptors, threads = _open_descriptors(), threading.active_count()
    with source.open() as files:
        files.read(listed["d/e/f"])
        files.read_chunk(listed["large"], 0, 10)
        files.chunk_list(listed["large"])
    indexed = DirectorySource(root, index_path=tmp_path / "index.db")
    given_up = indexed.scan(Selection(), warn=print)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    with indexed.open() as files:
        files.chunk_list(listed["large"])
    assert (_open_descriptors(), threading.active_count()) == (descriptors, threads)
