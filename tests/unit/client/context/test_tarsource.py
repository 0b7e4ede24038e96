"""A tar archive is listed and read like the directory that it was made from."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_client.context.source import DirectorySource, ListedContent, Selection
from offload_client.context.tarsource import TarSource
from offload_core.chunklist import CHUNKED_ABOVE_BYTES, decode_chunks, offsets
from offload_core.errors import ContextChangedError, ContextError
from offload_core.filemode import MODE_DIR, MODE_SYMLINK, go_file_mode
from tests.fixtures.tarballs import (
    TIME,
    Member,
    archive,
    content,
    entries,
    file,
    folder,
    hard_link,
    link,
    spooled,
)


@contextmanager
def source_of(data: bytes, **options: Any) -> Iterator[TarSource]:
    with tempfile.TemporaryFile() as spool:
        source = TarSource(spooled(data, spool), **options)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def tree(*members: Member, **options: Any) -> Iterator[TarSource]:
    with source_of(archive(*members), **options) as source:
        yield source


def paths(*members: Member, **selection: list[str]) -> list[str]:
    with tree(*members) as source:
        return [entry.path for entry in entries(source, **selection)]


NAMES = ["a", "b", "ab", "a.b", "a b", "é", "z" * 120, "Z"]
path_texts = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
things = st.one_of(
    st.tuples(
        st.just("file"), st.binary(max_size=300), st.sampled_from([0o644, 0o755, 0o600, 0o4755])
    ),
    st.tuples(st.just("folder"), st.just(b""), st.sampled_from([0o755, 0o700, 0o1777])),
    st.tuples(st.just("link"), path_texts.map(str.encode), st.just(0)),
    st.tuples(st.just("hard link"), st.just(b""), st.just(0)),
    st.tuples(st.just("pipe"), st.just(b""), st.sampled_from([0o644, 0o600])),
)
trees = st.dictionaries(path_texts, things, max_size=12)
patterns = st.lists(
    st.tuples(st.booleans(), path_texts | st.sampled_from(["*", "a*", "**/b", "a/*", "[ab]"])).map(
        lambda parts: ("!" if parts[0] else "") + parts[1]
    ),
    max_size=3,
)


def write(root: Path, described: dict[str, tuple[str, bytes, int]]) -> None:
    files: list[Path] = []
    for name, (kind, data, mode) in described.items():
        path = root / name
        above = [parent for parent in path.parents if os.path.lexists(parent)]
        if os.path.lexists(path) or not all(p.is_dir() and not p.is_symlink() for p in above):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir()
            path.chmod(mode)
        elif kind == "link":
            path.symlink_to(data.decode())
        elif kind == "pipe":
            os.mkfifo(path)
            path.chmod(mode)
        elif kind == "hard link" and files:
            path.hardlink_to(files[len(name) % len(files)])
        else:
            path.write_bytes(data)
            path.chmod(mode or 0o644)
            files.append(path)
    for path in [root, *root.rglob("*")]:
        os.utime(path, (TIME, TIME + len(path.name)), follow_symlinks=False)


@given(
    trees, patterns, patterns,
    st.just([]) | st.lists(path_texts | st.just("a*"), max_size=2), st.booleans(),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.booleans(),
)  # fmt: skip
def test_archive_of_a_tree_lists_as_the_tree(
    described: dict[str, tuple[str, bytes, int]],
    include: list[str],
    exclude: list[str],
    follow: list[str],
    normalise: bool,
    kind: int,
    dotted: bool,
) -> None:
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryFile() as spool:
        root = Path(made)
        write(root, described)
        with tarfile.open(fileobj=spool, mode="w", format=kind) as packed:
            if dotted:
                packed.add(root, "./")
            else:
                for path in sorted(root.iterdir(), reverse=True):
                    packed.add(path, path.name)
        spool.flush()
        directory = DirectorySource(root, index_path=None, normalise_modes=normalise)
        source = TarSource(spool.fileno(), normalise_modes=normalise)
        try:
            selection = {
                "include": [text for text in include if not text.startswith("!")],
                "exclude": exclude,
                "follow": follow,
            }
            expected = entries(directory, **selection)
            if follow:
                # fsutil overlooks what is behind a link that it has met before.
                found = {entry.path for entry in entries(source, **selection)}
                assert found.issuperset(entry.path for entry in expected)
                return
            assert entries(source, **selection) == expected
            for entry in expected:
                if entry.sha256 and entry.size_bytes:
                    assert content(source, entry) == content(directory, entry)
        finally:
            source.close()


def test_parents_that_have_no_entry_are_made() -> None:
    with tree(file("a/b/c", "x")) as source:
        assert [(entry.path, entry.mode) for entry in entries(source)] == [
            ("a", MODE_DIR | 0o755), ("a/b", MODE_DIR | 0o755), ("a/b/c", 0o644),
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["f", "./f", "/f", "././f", "//f", "a/../f", "./a/.././f"])
def test_names_are_cleaned(name: str) -> None:
    assert paths(file(name)) == ["f"]


def test_root_of_the_archive_is_no_entry() -> None:
    assert paths(folder("./"), folder("/"), file("./f")) == ["f"]


def test_last_entry_of_a_name_wins() -> None:
    members = [file("f", "1"), folder("d"), file("d/in"), file("f", "2", mode=0o755)]
    with tree(*members, folder("d", mtime=5)) as source:
        (d, inside, f) = entries(source)
        assert (d.path, d.modified_at_ns, inside.path) == ("d", 5 * 10**9, "d/in")
        assert (f.mode, content(source, f)) == (0o755, b"2")


def test_file_replaces_a_directory_and_a_directory_a_file() -> None:
    assert paths(file("d/in"), file("d")) == ["d"]
    assert paths(file("d"), folder("d"), file("d/in")) == ["d", "d/in"]


def test_hard_links_name_the_first_path_of_the_listing() -> None:
    members = [file("z/data", "same"), hard_link("a", "z/data"), hard_link("m", "./a")]
    with tree(*members) as source:
        a, m, _, z = entries(source)
        assert (a.path, a.link_name, a.size_bytes) == ("a", "", 4)
        assert (m.path, m.link_name, m.size_bytes, m.sha256) == ("m", "a", 0, None)
        assert (z.path, z.link_name) == ("z/data", "a")
        assert content(source, a) == b"same"
        (only,) = entries(source, include=["m"])
        assert (only.path, only.link_name, only.size_bytes) == ("m", "", 4)


def test_other_name_of_a_replaced_file_keeps_its_content() -> None:
    with tree(file("a", "old"), hard_link("b", "a"), file("a", "new")) as source:
        a, b = entries(source)
        assert (content(source, a), content(source, b)) == (b"new", b"old")
        assert (a.link_name, b.link_name) == ("", "")


def test_links_in_the_path_of_an_entry_are_followed_inside_the_archive() -> None:
    members = [folder("real"), link("one", "real"), link("two", "/one"), file("two/x", "1")]
    assert paths(*members) == ["one", "real", "real/x", "two"]
    assert paths(link("lost", "/not/there"), file("lost/x")) == [
        "lost", "not", "not/there", "not/there/x",
    ]  # fmt: skip


def test_symbolic_links_may_lead_anywhere() -> None:
    with tree(link("out", "../../etc"), link("abs", "/etc/passwd")) as source:
        assert [(entry.link_name, entry.mode) for entry in entries(source)] == [
            ("/etc/passwd", MODE_SYMLINK | 0o777), ("../../etc", MODE_SYMLINK | 0o777),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([file("../x")], '"../x" of the tar archive leads out of the build context with ".."'),
        ([file("a/../../x")], "leads out"),
        ([hard_link("x", "../y")], 'entry "x" of the tar archive leads out'),
        ([hard_link("x", "y")], 'is a hard link to "y", which is not before it'),
        ([folder("y"), hard_link("x", "y")], "which is a directory"),
        ([file("z"), file("z/y")], '"z/y" of the tar archive is below "z"'),
        ([link("l", "../.."), file("l/x")], "leaves the build context through a symbolic link"),
        ([link("l", "l"), file("l/x")], "in a circle"),
        ([link("l", "."), folder("l/..", mode=0o1)], None),
        ([Member("v", b"", {"type": b"V"})], "is of type 'V'"),
    ],
)
def test_hostile_and_broken_entries_are_refused(members: list[Member], problem: str | None) -> None:
    if problem is None:
        assert paths(*members) == ["l"]
        return
    with pytest.raises(ContextError) as caught:
        paths(*members)
    assert problem in caught.value.message


def test_names_that_are_not_utf8_are_refused() -> None:
    data = archive(file(os.fsdecode(b"caf\xe9")), kind=tarfile.GNU_FORMAT)
    with pytest.raises(ContextError, match="UTF-8"), source_of(data):
        pass


@pytest.mark.parametrize("cut", [1, 511, 513, 700, 1024, 1500])
def test_archive_that_is_cut_off_is_an_error(cut: int) -> None:
    data = archive(file("a", b"x" * 100), file("b", b"y" * 600))[: 512 + 512 + 512 + 1024 - cut]
    with pytest.raises(ContextError, match="damaged or cut off"), source_of(data):
        pass


def test_header_that_is_damaged_in_the_middle_is_an_error() -> None:
    data = bytearray(archive(file("a", b"x"), file("b"), file("c")))
    data[1024] ^= 0xFF
    with pytest.raises(ContextError, match="damaged or cut off"), source_of(bytes(data)):
        pass


@given(st.binary(min_size=512, max_size=3000))
def test_any_bytes_are_an_archive_or_an_error(noise: bytes) -> None:
    data = archive(file("a", b"x"))[:1024] + noise
    try:
        with source_of(data) as source:
            entries(source)
    except ContextError as error:
        assert error.message


def test_times_have_nanoseconds() -> None:
    exact = Member("f", b"", {"pax_headers": {"mtime": "1600000000.123456789"}})
    before = Member("g", b"", {"pax_headers": {"mtime": "-0.5"}})
    with tree(exact, before) as source:
        assert [entry.modified_at_ns for entry in entries(source)] == [
            1_600_000_000_123_456_789, -500_000_000,
        ]  # fmt: skip


def test_attributes_and_devices() -> None:
    attributes = {"SCHILY.xattr.user.note": "v\udcff", "SCHILY.xattr.security.selinux": "label"}
    device = Member("dev", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})
    with tree(Member("f", b"", {"pax_headers": attributes}), device) as source:
        dev, f = entries(source)
        assert f.xattrs == {"user.note": b"v\xff"}
        assert (dev.device_major, dev.device_minor) == (1, 3)
        assert dev.mode == go_file_mode(stat.S_IFCHR | 0o644)


def test_modes_are_those_of_the_archive_when_wanted() -> None:
    members = [file("f", mode=0o664), folder("d", mode=0o700)]
    with tree(*members, normalise_modes=False) as source:
        assert [entry.mode for entry in entries(source)] == [MODE_DIR | 0o700, 0o664]
    with tree(*members) as source:
        assert [entry.mode for entry in entries(source)] == [MODE_DIR | 0o755, 0o644]


def test_followpaths_lead_through_links() -> None:
    members = [
        link("app", "current"), link("current", "releases/2"), file("releases/1/x"),
        file("releases/2/x"), file("other"), link("dir", "/releases"),
    ]  # fmt: skip
    assert paths(*members, follow=["app/x"]) == [
        "app", "current", "releases", "releases/2", "releases/2/x",
    ]  # fmt: skip
    assert paths(*members, follow=["dir/1/*"]) == ["dir", "releases", "releases/1", "releases/1/x"]


def test_nothing_behind_a_link_that_two_paths_share_is_missed() -> None:
    members = [link("app", "current"), link("current", "releases"), file("releases/a"),
               file("releases/b"), file("other"), link("loop", "loop/x")]  # fmt: skip
    assert paths(*members, follow=["current/a", "app/b", "loop"]) == [
        "app", "current", "loop", "releases", "releases/a", "releases/b",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def large() -> bytes:
    import random

    return random.Random(1).randbytes(CHUNKED_ABOVE_BYTES + 1_234_567)


def listed(source: TarSource, path: str) -> ListedContent:
    (entry,) = [entry for entry in entries(source) if entry.path == path]
    assert entry.sha256 is not None
    return ListedContent(entry.path, entry.size_bytes, entry.sha256, entry.modified_at_ns)


def test_large_files_have_the_chunk_list_that_they_have_in_a_directory(
    large: bytes, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(large)
    (expected,) = entries(DirectorySource(tmp_path, index_path=None))
    with tree(file("a"), file("large", large), file("z")) as source:
        found = listed(source, "large")
        assert found.sha256 == expected.sha256
        with source.open() as reader:
            chunk_list = reader.chunk_list(found)
            assert hashlib.sha256(chunk_list).digest() == found.sha256
            chunks = decode_chunks(chunk_list, found.size_bytes)
            for chunk, offset in zip(chunks, offsets(chunks), strict=True):
                piece = reader.read_chunk(found, offset, chunk.size_bytes)
                assert hashlib.sha256(piece).digest() == chunk.sha256


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_files_are_whole(large: bytes, tmp_path: Path, kind: str) -> None:
    import subprocess

    for name, size in (("small", 300_000), ("large", 9_000_000)):
        with (tmp_path / name).open("wb") as sparse:
            sparse.seek(100_000)
            sparse.write(large[:4096])
            sparse.truncate(size)
    packed = tmp_path / "packed.tar"
    subprocess.run(
        ["tar", f"--format={kind}", "--sparse", "-C", tmp_path, "-cf", packed, "small", "large"],
        check=True,
    )
    assert packed.stat().st_size < 300_000
    directory = DirectorySource(tmp_path, index_path=None)
    expected = {e.path: (e.size_bytes, e.sha256) for e in entries(directory)}
    with source_of(packed.read_bytes()) as source:
        for name in ("small", "large"):
            found = listed(source, name)
            assert (found.size_bytes, found.sha256) == expected[name]
            with source.open() as reader:
                whole = (tmp_path / name).read_bytes()
                assert reader.read_chunk(found, 99_000, 7000) == whole[99_000:106_000]


def test_reader_refuses_what_was_not_listed() -> None:
    with tree(file("f", "x")) as source, source.open() as reader:
        found = listed(source, "f")
        for other in (found._replace(path="g"), found._replace(sha256=b"0" * 32)):
            with pytest.raises(ContextChangedError):
                reader.read(other)
        with pytest.raises(ContextChangedError):
            reader.read_chunk(found, 1, 1)


def test_scans_and_readers_outlive_their_source() -> None:
    with tree(file("f", "x"), file("g", "y")) as source:
        found = listed(source, "f")
        reader = source.open()
        scan = source.scan(Selection(), warn=lambda _: None)
        next(scan)
    with reader:
        assert reader.read(found) == b"x"
    assert [entry.path for entry in scan] == ["g"]  # type: ignore[union-attr]
