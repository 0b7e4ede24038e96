"""Reading delivers exactly what was listed, or says what happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload_client.context.reader import BlobReader, read_blob, read_small
from offload_client.context.scan import TreeEntry, scan_context
from offload_core.errors import ContextChangedError


def _entries(root: Path) -> dict[str, TreeEntry]:
    return {entry.path: entry for entry in scan_context(root, warn=print)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_bytes(b"0123456789")
    return tmp_path


@pytest.mark.parametrize("chunk_bytes", [1, 3, 5, 9, 10, 11, 1 << 20])
def test_chunks_join_to_the_content(root: Path, chunk_bytes: int) -> None:
    pieces = list(read_blob(root, _entries(root)["d/e/f"], chunk_bytes=chunk_bytes))
    assert b"".join(pieces) == b"0123456789"
    assert all(0 < len(piece) <= chunk_bytes for piece in pieces)


def test_empty_file_has_no_pieces(root: Path) -> None:
    (root / "empty").write_bytes(b"")
    assert list(read_blob(root, _entries(root)["empty"])) == []


@pytest.mark.parametrize("chunk_bytes", [5, 10, 100])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"012345678X", "content is another"),
        (b"X123456789", "content is another"),
        (b"012345678", "shrank"),
        (b"", "shrank"),
        (b"0123456789+", "grew"),
    ],
)
def test_changed_file_is_never_delivered_whole(
    root: Path, content: bytes, what: str, chunk_bytes: int
) -> None:
    entry = _entries(root)["d/e/f"]
    (root / "d" / "e" / "f").write_bytes(content)
    delivered = b""
    with pytest.raises(ContextChangedError, match=f'"d/e/f".*{what}'):
        for piece in read_blob(root, entry, chunk_bytes=chunk_bytes):
            delivered += piece
    assert len(delivered) < 10


def test_file_that_is_gone_is_named(root: Path) -> None:
    entry = _entries(root)["d/e/f"]
    (root / "d" / "e" / "f").unlink()
    with pytest.raises(ContextChangedError, match=r'"d/e/f".*gone'):
        list(read_blob(root, entry))


def test_link_in_place_of_a_directory_is_not_followed(root: Path, tmp_path: Path) -> None:
    entry = _entries(root)["d/e/f"]
    (root / "d").rename(root / "moved")
    (root / "d").symlink_to("moved")
    with pytest.raises(ContextChangedError, match="symbolic link"):
        list(read_blob(root, entry))


def test_link_in_place_of_the_file_is_not_followed(root: Path) -> None:
    entry = _entries(root)["d/e/f"]
    (root / "d" / "e" / "f").rename(root / "same")
    (root / "d" / "e" / "f").symlink_to("../../same")
    with pytest.raises(ContextChangedError, match="symbolic link"):
        list(read_blob(root, entry))


def test_named_pipe_in_place_of_the_file_does_not_block(root: Path) -> None:
    entry = _entries(root)["d/e/f"]
    (root / "d" / "e" / "f").unlink()
    os.mkfifo(root / "d" / "e" / "f")
    with pytest.raises(ContextChangedError):
        list(read_blob(root, entry))


def test_batch_reads_what_is_there_and_reports_the_rest_in_place(root: Path) -> None:
    for name in ("a", "d/b", "d/e/c", "z"):
        (root / name).write_bytes(name.encode())
    entries = _entries(root)
    (root / "d" / "b").unlink()
    got = read_small(root, [entries[name] for name in ("z", "d/e/c", "d/b", "a", "d/e/f")])
    assert isinstance(got[2], ContextChangedError)
    assert [item for item in got if isinstance(item, bytes)] == [
        b"z",
        b"d/e/c",
        b"a",
        b"0123456789",
    ]


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reading_leaves_no_descriptor_open(root: Path) -> None:
    entry = _entries(root)["d/e/f"]
    before = _open_descriptors()
    pieces = read_blob(root, entry, chunk_bytes=2)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    with BlobReader(root) as reader:
        reader.read(entry)
    given_up = scan_context(root, warn=print)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert _open_descriptors() == before


def test_directory_has_no_content(root: Path) -> None:
    with pytest.raises(ValueError, match="no regular file"):
        list(read_blob(root, _entries(root)["d"]))
