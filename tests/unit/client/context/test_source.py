"""A directory as a source of a build: selections, and what a second scan need not do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload_client.context import digests
from offload_client.context.entries import tree_entries
from offload_client.context.hashing import FileHasher
from offload_client.context.listing import ClientListing
from offload_client.context.source import ContextSource, DirectorySource, Selection
from offload_core.errors import ContextError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("a/f", "b/f", "c/f", "top"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "link").symlink_to("b/f")
    return root


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were really read; the index trusts all of them."""
    monkeypatch.setattr(digests, "DIRECT_FILES", -1)
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**12))
    read: list[str] = []
    hash_file = FileHasher.hash_file

    def recording(self: FileHasher, fd: int, name: str, path: str, status: os.stat_result):  # type: ignore[no-untyped-def]
        read.append(path)
        return hash_file(self, fd, name, path, status)

    monkeypatch.setattr(FileHasher, "hash_file", recording)
    return read


def _paths(source: ContextSource, selection: Selection) -> list[str]:
    return [entry.path for entry in tree_entries(source.scan(selection, warn=print))]


@pytest.mark.parametrize(
    ("selection", "paths"),
    [
        (Selection(), ["a", "a/f", "b", "b/f", "c", "c/f", "link", "top"]),
        (Selection(include=["b", "top"]), ["b", "b/f", "top"]),
        (Selection(exclude=["*", "!c/f"]), ["c", "c/f"]),
        (Selection(follow=["link"]), ["b", "b/f", "link"]),
    ],
)
def test_selection_is_what_is_scanned(root: Path, selection: Selection, paths: list[str]) -> None:
    assert _paths(DirectorySource(root, index_path=None), selection) == paths


def test_excluded_directory_is_not_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    opening = os.open

    def recording(path: str, flags: int, **options: int) -> int:
        opened.append(path)
        return opening(path, flags, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", recording)
    source = DirectorySource(root, index_path=None)
    assert _paths(source, Selection(exclude=["b"])) == ["a", "a/f", "c", "c/f", "link", "top"]
    assert "a" in opened
    assert "b" not in opened


def test_second_scan_reads_nothing_and_lists_the_same(
    root: Path, tmp_path: Path, read_files: list[str]
) -> None:
    pages = []
    for _ in range(2):
        listing = ClientListing()
        source = DirectorySource(root, index_path=tmp_path / "index.db")
        for item in source.scan(Selection(), warn=print):
            listing.add(item)
        listing.finish()
        pages.append(listing.pages)
    assert pages[0] == pages[1]
    assert sorted(read_files) == ["a/f", "b/f", "c/f", "top"]


def test_scan_that_is_given_up_keeps_what_it_learned(
    root: Path, tmp_path: Path, read_files: list[str]
) -> None:
    source = DirectorySource(root, index_path=tmp_path / "index.db")
    scan = source.scan(Selection(), warn=print)
    for _ in range(3):
        next(scan)
    scan.close()  # type: ignore[attr-defined]
    learned = list(read_files)
    assert "a/f" in learned
    assert "c/f" not in learned
    read_files.clear()
    _paths(source, Selection())
    assert not set(learned) & set(read_files)


def test_modes_can_be_kept(root: Path) -> None:
    (root / "top").chmod(0o600)
    modes = {}
    for normalise in (True, False):
        source = DirectorySource(root, index_path=None, normalise_modes=normalise)
        found = tree_entries(source.scan(Selection(), warn=print))
        modes[normalise] = {entry.path: entry.mode for entry in found}["top"]
    assert modes == {True: 0o644, False: 0o600}


def test_malformed_pattern_is_an_error_of_the_scan(root: Path) -> None:
    source = DirectorySource(root, index_path=None)
    with pytest.raises(ContextError, match="malformed"):
        _paths(source, Selection(exclude=["[a"]))
