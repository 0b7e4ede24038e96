"""What a mount holds survives packing and unpacking; what is hostile is refused."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path

import pytest

from offload_builder.node.mounts.packing import (
    RESTORE_PREFIX,
    ChangedError,
    Index,
    Packer,
    TooLargeError,
)
from offload_builder.node.mounts.tree import PIECE_BYTES, Entry, Kind, Tree, compress
from offload_builder.node.mounts.unpacking import Unpacker, clear_leftovers


class Place:
    """Directories to pack and to fill, and the blobs between them."""

    def __init__(self, root: Path) -> None:
        self.source = root / "source"
        self.source.mkdir()
        self.root = root
        self.blobs: dict[str, bytes] = {}
        self.new: list[str] = []
        self.index = Index()
        self.tree = Tree()

    def pack(self, folder: Path | None = None, limit: int = 1 << 30) -> Tree:
        os.chdir(folder or self.source)
        self.new = []

        def emit(digest: str, blob: bytes) -> None:
            self.blobs[digest] = blob
            self.new.append(digest)

        packer = Packer(Index.decode(self.index.encode()), limit, emit)
        packer.run()
        self.index, self.tree = packer.index, packer.tree
        return packer.tree

    def unpack(self, tree: Tree | None = None, name: str = "target") -> Path:
        target = self.root / name
        target.mkdir()
        os.chdir(target)
        decoded = Tree.decode((tree or self.tree).encode())
        unpacker = Unpacker(decoded, "x")
        for number in reversed(range(len(decoded.pieces))):
            unpacker.add(number, self.blobs[decoded.pieces[number].digest])
        unpacker.complete()
        assert all(path.name.startswith(RESTORE_PREFIX) for path in target.iterdir())
        unpacker.place()
        self.index = unpacker.index()
        return target


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    os.umask(before)
    yield Place(tmp_path)
    os.umask(before)


def facts(folder: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = (path.read_bytes(), status.st_nlink)
        attributes = (
            ()
            if path.is_symlink()
            else tuple((name, os.getxattr(path, name)) for name in os.listxattr(path))
        )
        found[str(path.relative_to(folder))] = (
            stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid,
            status.st_gid, status.st_mtime_ns, content, attributes,
        )  # fmt: skip
    return found


def test_everything_that_a_step_can_leave_survives(place: Place) -> None:
    source = place.source
    (source / "dir" / "deep").mkdir(parents=True)
    (source / "dir" / "file").write_bytes(b"content")
    os.chown(source / "dir" / "file", 7, 8)
    (source / "dir" / "file").chmod(0o6711)
    os.link(source / "dir" / "file", source / "zlink")
    (source / "soft").symlink_to("../outside")
    (source / "empty").touch()
    (source / "large").write_bytes(os.urandom(PIECE_BYTES + 5) + bytes(PIECE_BYTES))
    os.setxattr(source / "empty", "user.note", b"\0x")
    os.mkfifo(source / "pipe", 0o620)
    (source / os.fsdecode(b"odd\xff\n")).write_text("odd name")
    (source / "closed").mkdir()
    (source / "closed" / "x").touch()
    (source / "closed").chmod(0o500)
    os.utime(source / "dir", ns=(1, 1_000_000_000_123_456_789))
    source.chmod(0o1777)
    os.utime(source, ns=(1, 5_000_000_001))
    place.pack()
    assert facts(place.unpack()) == facts(source)


def test_access_lists_survive(place: Place) -> None:
    rows = ((0x01, 7, -1), (0x02, 5, 1234), (0x04, 5, -1), (0x10, 5, -1), (0x20, 0, -1))
    rules = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *row) for row in rows)
    folder = place.source / "folder"
    folder.mkdir()
    (place.source / "small").write_bytes(b"x")
    (place.source / "large").write_bytes(os.urandom(PIECE_BYTES + 1))
    for path in (folder, place.source / "small", place.source / "large"):
        os.setxattr(path, "system.posix_acl_access", rules)
    os.setxattr(folder, "system.posix_acl_default", rules)
    place.pack()
    assert facts(place.unpack()) == facts(place.source)


def test_holes_of_a_large_file_stay_holes(place: Place) -> None:
    path = place.source / "database"
    with path.open("wb") as file:
        file.seek(5 * PIECE_BYTES)
        file.write(b"in the middle")
        file.truncate(9 * PIECE_BYTES + 1)
    place.pack()
    target = place.unpack()
    assert facts(target) == facts(place.source)
    assert (target / "database").stat().st_blocks * 512 < PIECE_BYTES


def test_sockets_and_leftovers_of_restores_are_no_content(place: Place) -> None:
    import socket

    (place.source / f"{RESTORE_PREFIX}1").mkdir()
    (place.source / "kept").touch()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(place.source)
        server.bind("s")
        tree = place.pack()
    assert [entry.path for entry in tree.entries] == ["", "kept"]


def test_same_content_gives_the_same_tree_and_no_new_piece(place: Place) -> None:
    for number in range(20):
        (place.source / str(number)).write_bytes(os.urandom(100))
    first = place.pack().encode()
    assert place.new
    second = place.pack().encode()
    assert (second, place.new) == (first, [])
    target = place.unpack()
    assert place.pack(target).encode() == first
    assert place.new == []


def test_new_files_make_new_pieces_and_old_ones_stay(place: Place) -> None:
    for number in range(50):
        (place.source / f"{number:02}").write_bytes(os.urandom(300_000))
    place.pack()
    before = set(place.blobs)
    (place.source / "25more").write_bytes(b"new")
    (place.source / "10").write_bytes(b"changed")
    (place.source / "30").unlink()
    tree = place.pack()
    assert len(place.new) == 1
    assert {piece.digest for piece in tree.pieces} - before == set(place.new)
    assert facts(place.unpack()) == facts(place.source)


def test_change_that_keeps_size_and_time_is_seen(place: Place) -> None:
    path = place.source / "file"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    place.pack()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    place.pack()
    assert (place.unpack() / "file").read_bytes() == b"two"


def test_piece_that_is_mostly_dead_is_written_again(place: Place) -> None:
    for number in range(10):
        (place.source / str(number)).write_bytes(os.urandom(1000))
    place.pack()
    old = place.tree.pieces[0].digest
    for number in range(6):
        (place.source / str(number)).unlink()
    tree = place.pack()
    assert old not in {piece.digest for piece in tree.pieces}
    assert [piece.content_bytes for piece in tree.pieces] == [4000]
    assert facts(place.unpack()) == facts(place.source)


def test_appended_large_file_keeps_its_segments(place: Place) -> None:
    path = place.source / "db"
    path.write_bytes(os.urandom(3 * PIECE_BYTES))
    place.pack()
    before = dict(place.blobs)
    with path.open("ab") as file:
        file.write(b"more")
    place.pack()
    assert len(set(place.blobs) - set(before)) == 1


def test_more_than_the_bound_is_refused(place: Place) -> None:
    (place.source / "file").write_bytes(bytes(1001))
    with pytest.raises(TooLargeError):
        place.pack(limit=1000)


def test_file_that_changes_meanwhile_is_no_snapshot(place: Place) -> None:
    (place.source / "a").write_bytes(os.urandom(PIECE_BYTES + 1))
    (place.source / "b").write_bytes(b"b")
    os.chdir(place.source)
    packer = Packer(Index(), 1 << 30, lambda *_: (place.source / "b").write_bytes(b"changed"))
    with pytest.raises(ChangedError):
        packer.run()


def test_file_that_changes_while_it_is_read_is_no_snapshot(place: Place) -> None:
    path = place.source / "a"
    path.write_bytes(os.urandom(3 * PIECE_BYTES))
    os.chdir(place.source)

    def change(*_: object) -> None:
        with path.open("r+b") as file:
            file.write(b"changed")

    with pytest.raises(ChangedError):
        Packer(Index(), 1 << 30, change).run()


def test_nothing_is_seen_before_the_end_and_leftovers_go(place: Place) -> None:
    (place.source / "file").write_bytes(b"x")
    tree = place.pack()
    target = place.root / "target"
    target.mkdir()
    os.chdir(target)
    unpacker = Unpacker(tree, "1")
    with pytest.raises(ValueError, match="missing"):
        unpacker.complete()
    assert [path.name for path in target.iterdir()] == [f"{RESTORE_PREFIX}1"]
    with pytest.raises(ValueError, match="damaged"):
        unpacker.add(0, b"other")
    clear_leftovers()
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    "entry",
    [
        Entry(Kind.FILE, "../out", 0o644, 0, 0, 0),
        Entry(Kind.FILE, "/out", 0o644, 0, 0, 0),
        Entry(Kind.FILE, "a//b", 0o644, 0, 0, 0),
        Entry(Kind.HARD_LINK, "a", 0, 0, 0, 0, target="../../etc/passwd"),
        Entry(Kind.FILE, "a", 0o644, 0, 0, 0, extents=[0, 0, 1]),
    ],
)
def test_tree_that_leaves_the_mount_is_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match=r"leaves|lies in no piece"):
        Tree.decode(Tree([entry]).encode())


@pytest.mark.parametrize("data", [b"", b"{}", compress(b"{}"), compress(b"[]"), compress(b"x")])
def test_what_is_no_tree_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Tree.decode(data)
    assert Index.decode(data).files == {}


def test_link_that_was_planted_is_not_followed(place: Place) -> None:
    (place.source / "dir").mkdir()
    (place.source / "dir" / "file").write_bytes(b"x")
    tree = place.pack()
    outside = place.root / "outside"
    outside.mkdir()
    target = place.root / "target"
    target.mkdir()
    os.chdir(target)
    unpacker = Unpacker(tree, "1")
    shutil.rmtree(target / f"{RESTORE_PREFIX}1" / "dir")
    (target / f"{RESTORE_PREFIX}1" / "dir").symlink_to("/nonexistent")
    with pytest.raises(OSError, match="No such file"):
        unpacker.add(0, place.blobs[tree.pieces[0].digest])
    assert list(outside.iterdir()) == []
