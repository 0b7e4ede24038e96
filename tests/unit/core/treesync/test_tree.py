from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload_core.errors import NotFoundError, UsageError
from offload_core.treesync.entries import check_path
from offload_core.treesync.inotify import Inotify
from offload_core.treesync.rules import Rules
from offload_core.treesync.tree import MeanwhileError, Tree, conflict_name, stamp_of
from tests.fixtures.syncservice import names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "path", [b"", b"/a", b"a/", b"a//b", b".", b"a/../b", b"..", b"a\0b", b"x" * 256, b"a/" * 2000]
)
def test_path_that_could_lead_out_is_refused(path: bytes) -> None:
    with pytest.raises(UsageError):
        check_path(path)


def test_file_that_was_written_in_the_last_moment_is_kept(root: Path) -> None:
    tree = Tree(root)
    (root / "file").write_text("old")
    before = stamp_of((root / "file").stat())
    fd, temporary = tree.new_file("file")
    os.write(fd, b"new")
    tree.complete(fd, 0o644, 0)
    os.close(fd)
    (root / "file").write_text("just written")
    kept = tree.place(temporary, "file", before)
    assert (root / "file").read_text() == "new"
    assert (root / kept).read_text() == "just written"
    tree.close()


def test_file_that_has_come_in_the_last_moment_is_not_replaced(root: Path) -> None:
    tree = Tree(root)
    fd, temporary = tree.new_file("file")
    os.close(fd)
    (root / "file").write_text("just written")
    with pytest.raises(MeanwhileError):
        tree.place(temporary, "file", None)
    assert (root / "file").read_text() == "just written"
    tree.close()


def test_file_that_was_written_before_its_removal_is_kept(root: Path) -> None:
    tree = Tree(root)
    (root / "file").write_text("old")
    before = stamp_of((root / "file").stat())
    (root / "file").write_text("just written")
    kept = tree.remove("file", before)
    assert [path.name for path in root.iterdir()] == [kept]
    assert (root / kept).read_text() == "just written"
    tree.close()


@pytest.mark.parametrize("how", ["write", "read", "remove", "aside", "mode"])
def test_link_is_never_followed(root: Path, tmp_path: Path, how: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    (root / "d").symlink_to(outside)
    (root / "f").symlink_to(outside / "file")
    tree = Tree(root)
    with pytest.raises(OSError):
        if how == "write":
            tree.new_file("d/file")
        elif how == "read":
            os.close(tree.open_file("f"))
        elif how == "remove":
            tree.remove("d/file", stamp_of((outside / "file").stat()))
        elif how == "aside":
            tree.set_aside("d/file", "other")
        else:
            tree.set_status("f", 0o777, 0)
    assert (outside / "file").stat().st_mode & 0o777 == 0o644
    assert names(outside) == ["file"]
    tree.close()


def test_root_that_was_replaced_is_noticed(root: Path) -> None:
    tree = Tree(root)
    tree.check()
    root.rename(root.with_name("moved"))
    root.mkdir()
    with pytest.raises(NotFoundError):
        tree.check()
    tree.close()


def test_name_of_a_conflict_fits_into_a_directory() -> None:
    assert len(os.fsencode(conflict_name("x" * 255))) == 255


def test_exception_below_an_ignored_directory_keeps_its_parents() -> None:
    rules = Rules(["*", "!src/main.py"])
    assert rules.wanted("src", is_directory=True)
    assert rules.wanted("src/main.py", is_directory=False)
    assert not rules.wanted("src/other.py", is_directory=False)
    assert not rules.wanted("lib", is_directory=True)


def test_our_own_files_are_never_synchronised() -> None:
    assert not Rules().wanted("d/.offload-sync-0123", is_directory=False)


def test_directory_behind_a_link_is_not_watched(root: Path) -> None:
    (root / "d").symlink_to("/usr")
    watcher = Inotify()
    watcher.watch("d", str(root / "d"))
    watcher.watch("", str(root))
    (root / "new").write_text("")
    assert watcher.read().paths == {"new"}
    watcher.close()
