"""What a scan lists: contents, links, special files, modes and errors."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_client.context import digests, dirscan, hashing
from offload_client.context.entries import TreeEntry, tree_entries
from offload_client.context.hashing import FileHasher
from offload_client.context.scan import scan_context
from offload_client.context.statindex import StatIndex
from offload_core.chunklist import CHUNKED_ABOVE_BYTES, decode_chunks
from offload_core.errors import ContextChangedError, ContextError
from offload_core.filedigest import ContentDigest, ContentDigester
from offload_core.filemode import MODE_DIR, MODE_NAMED_PIPE, MODE_SETUID, MODE_SYMLINK


def _scan(root: Path, **options: object) -> dict[str, TreeEntry]:
    options.setdefault("warn", _no_warning)
    found = scan_context(root, **options)  # type: ignore[arg-type]
    return {entry.path: entry for entry in tree_entries(found)}


def _no_warning(text: str) -> None:
    raise AssertionError(text)


def test_regular_file_has_digest_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    os.utime(tmp_path / "f", ns=(0, 1_600_000_000_123_456_789))
    entry = _scan(tmp_path)["f"]
    assert entry.sha256 == hashlib.sha256(b"content").digest()
    assert entry.size_bytes == 7
    assert entry.modified_at_ns == 1_600_000_000_123_456_789
    assert dict(entry.xattrs) == {}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_digest_is_right_around_the_buffer_size(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert _scan(tmp_path)["f"].sha256 == hashlib.sha256(data).digest()


def test_umask_does_not_show_in_normal_modes(tmp_path: Path) -> None:
    for name, mode in {"plain": 0o664, "secret": 0o600, "tool": 0o711, "suid": 0o4750}.items():
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).chmod(mode)
    (tmp_path / "d").mkdir()
    (tmp_path / "d").chmod(0o2770)
    found = _scan(tmp_path)
    assert found["plain"].mode == found["secret"].mode == 0o644
    assert found["tool"].mode == 0o755
    assert found["suid"].mode == MODE_SETUID | 0o755
    assert found["d"].mode == MODE_DIR | 0o755


def test_modes_stay_when_they_are_not_normalised(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "f").chmod(0o640)
    assert _scan(tmp_path, normalise_modes=False)["f"].mode == 0o640


def test_dangling_symbolic_link_is_listed_with_its_target(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to("../no/where")
    entry = _scan(tmp_path)["l"]
    assert entry.mode == MODE_SYMLINK | 0o777
    assert entry.link_name == "../no/where"
    assert entry.size_bytes == 0
    assert entry.sha256 is None


def test_link_to_a_directory_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"")
    (tmp_path / "l").symlink_to("d")
    assert list(_scan(tmp_path)) == ["d", "d/f", "l"]


def test_second_name_of_a_file_is_a_hard_link_to_the_first_one_listed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "z").write_bytes(b"same")
    (tmp_path / "d" / "f").hardlink_to(tmp_path / "z")
    (tmp_path / "a").hardlink_to(tmp_path / "z")
    found = _scan(tmp_path, exclude=["a"])
    assert found["d/f"].sha256 == hashlib.sha256(b"same").digest()
    assert found["d/f"].link_name == ""
    assert found["z"].link_name == "d/f"
    assert found["z"].sha256 is None
    assert found["z"].size_bytes == 0


def test_named_pipe_is_listed_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p", 0o600)
    assert _scan(tmp_path)["p"].mode == MODE_NAMED_PIPE | 0o644


def test_sockets_are_left_out_with_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    for name in ("s1", "s2"):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / name))
    assert _scan(tmp_path, warn=warnings.append) == {}
    assert len(warnings) == 1
    assert '"s1" and 1 more' in warnings[0]


def test_excluded_socket_gives_no_warning(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    assert _scan(tmp_path, exclude=["s"]) == {}


def test_name_that_is_not_utf8_is_an_error_that_shows_it(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")).write_bytes(b"")
    with pytest.raises(ContextError, match=r"caf\\xe9") as caught:
        _scan(tmp_path)
    assert "rename it" in caught.value.hint
    assert _scan(tmp_path, exclude=["caf*"]) == {}


def test_name_below_an_odd_directory_is_an_error(tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(directory)).mkdir()
    Path(os.fsdecode(directory + b"/f")).write_bytes(b"")
    with pytest.raises(ContextError, match="not UTF-8"):
        _scan(tmp_path, include=["*/f"])


def test_link_target_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to(os.fsdecode(b"\xff"))
    with pytest.raises(ContextError, match='link target of "l"'):
        _scan(tmp_path)


def test_missing_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="no-such-place"):
        _scan(tmp_path / "no-such-place")


def test_malformed_pattern_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match=r'"\[a" is malformed'):
        _scan(tmp_path, exclude=["[a"])


def test_parents_of_an_included_file_come_just_before_it(tmp_path: Path) -> None:
    for name in ("a/b/c/file", "a/b/other", "a/x/y/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(_scan(tmp_path, include=["a/b/c/file"])) == ["a", "a/b", "a/b/c", "a/b/c/file"]
    assert list(_scan(tmp_path, include=["a/b/no"])) == []


def test_followed_link_brings_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"")
    (tmp_path / "link").symlink_to("/real")
    (tmp_path / "other").write_bytes(b"")
    assert list(_scan(tmp_path, follow=["lin*/f"])) == ["link", "real", "real/f"]


def test_extended_attributes_of_users_are_listed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"")
    os.setxattr(tmp_path / "f", "user.note", b"\x00\x01")
    os.setxattr(tmp_path / "d", "user.dir", b"v")
    with StatIndex(tmp_path.parent / "index.db", tmp_path) as index:
        found = _scan(tmp_path, index=index)
    assert dict(found["f"].xattrs) == {"user.note": b"\x00\x01"}
    assert dict(found["d"].xattrs) == {"user.dir": b"v"}


def test_device_keeps_its_numbers(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    entry = _scan(tmp_path)["null"]
    assert (entry.device_major, entry.device_minor) == (1, 3)


def _write_during_reading(
    monkeypatch: pytest.MonkeyPatch, path: Path, contents: list[bytes]
) -> None:
    digest = ContentDigester.digest

    def disturbed(self: ContentDigester, fd: int, size: int) -> ContentDigest:
        result = digest(self, fd, size)
        if contents:
            path.write_bytes(contents.pop(0))
        return result

    monkeypatch.setattr(ContentDigester, "digest", disturbed)


LARGE = CHUNKED_ABOVE_BYTES + 1


def test_digest_of_a_large_file_is_that_of_its_chunk_list(tmp_path: Path) -> None:
    data = os.urandom(LARGE)
    (tmp_path / "at").write_bytes(data[:-1])
    (tmp_path / "above").write_bytes(data)
    chunk_lists: dict[bytes, bytes] = {}
    found = _scan(tmp_path, chunk_lists=chunk_lists)
    assert found["at"].sha256 == hashlib.sha256(data[:-1]).digest()
    ((sha256, chunk_list),) = chunk_lists.items()
    assert found["above"].sha256 == sha256 == hashlib.sha256(chunk_list).digest()
    assert found["above"].size_bytes == LARGE
    at = 0
    for chunk in decode_chunks(chunk_list, LARGE):
        assert hashlib.sha256(data[at : at + chunk.size_bytes]).digest() == chunk.sha256
        at += chunk.size_bytes


def test_same_bytes_have_the_same_digest_whatever_the_name_and_holes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"start")
        file.truncate(3 * LARGE)
    (tmp_path / "full").write_bytes(b"start" + bytes(3 * LARGE - 5))
    found = _scan(tmp_path)
    assert found["sparse"].sha256 == found["full"].sha256


def test_chunk_list_that_does_not_fit_into_a_message_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "MAX_LIST_BYTES", 100)
    (tmp_path / "huge").write_bytes(os.urandom(LARGE))
    with pytest.raises(ContextError, match='"huge" is too large'):
        _scan(tmp_path)


def test_file_with_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"same")
    (tmp_path / "b").hardlink_to(tmp_path / "d" / "a")
    read: list[str] = []
    hash_file = FileHasher.hash_file

    def recording(self: FileHasher, fd: int, name: str, path: str, status: os.stat_result):  # type: ignore[no-untyped-def]
        read.append(path)
        return hash_file(self, fd, name, path, status)

    monkeypatch.setattr(FileHasher, "hash_file", recording)
    assert _scan(tmp_path)["b"].sha256 == hashlib.sha256(b"same").digest()
    assert read == ["b"]


kinds = st.sampled_from(["file", "empty", "noted", "linked", "symlink", "directory"])


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefghij"), kinds), st.integers(1, 4))
def test_batches_and_a_known_index_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, str], batch: int
) -> None:
    base = tmp_path_factory.mktemp("tree")
    root = base / "root"
    root.mkdir()
    for name, kind in kinds.items():
        path = root / name
        if kind == "directory":
            path.mkdir()
        elif kind == "symlink":
            path.symlink_to("a")
        else:
            path.write_bytes(b"" if kind == "empty" else name.encode())
        if kind == "noted":
            os.setxattr(path, "user.note", name.encode())
        elif kind == "linked":
            (root / f"{name}-too").hardlink_to(path)
    expected = _scan(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "DIRECT_FILES", -1)
        patch.setattr(digests, "GRANULARITY_NS", -(10**12))
        for size in (batch, 2048, batch):
            patch.setattr(dirscan, "_BATCH_ENTRIES", size)
            with StatIndex(base / "index.db", root) as index:
                assert list(_scan(root, index=index).items()) == list(expected.items())


@pytest.mark.parametrize("size", [LARGE, LARGE + 1_000_000, 3, 0])
def test_large_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    (tmp_path / "f").write_bytes(os.urandom(LARGE))
    content = os.urandom(size)
    _write_during_reading(monkeypatch, tmp_path / "f", [content])
    entry = _scan(tmp_path)["f"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "f").write_bytes(content)
    assert entry.sha256 == _scan(tmp_path / "again")["f"].sha256
    assert entry.size_bytes == size


def _before_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    hash_file = FileHasher.hash_file

    def disturbed(self: FileHasher, fd: int, name: str, path: str, status: os.stat_result):  # type: ignore[no-untyped-def]
        change()
        return hash_file(self, fd, name, path, status)

    monkeypatch.setattr(FileHasher, "hash_file", disturbed)


def test_file_that_vanishes_before_it_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    _before_reading(monkeypatch, lambda: (tmp_path / "b").unlink(missing_ok=True))
    assert list(_scan(tmp_path)) == ["a", "c"]


def test_special_file_in_place_of_a_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"content")

    def replace() -> None:
        (tmp_path / "f").unlink()
        os.mkfifo(tmp_path / "f")

    _before_reading(monkeypatch, replace)
    with pytest.raises(ContextChangedError, match=r'"f".*no regular file'):
        _scan(tmp_path)


@pytest.mark.parametrize("content", [b"two", b"longer than before", b""])
def test_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "f").write_bytes(b"one")
    os.utime(tmp_path / "f", ns=(0, 0))
    _write_during_reading(monkeypatch, tmp_path / "f", [content])
    entry = _scan(tmp_path)["f"]
    assert entry.sha256 == hashlib.sha256(content).digest()
    assert entry.size_bytes == len(content)
    assert entry.modified_at_ns == (tmp_path / "f").stat().st_mtime_ns


def test_file_that_never_stops_changing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"")
    _write_during_reading(monkeypatch, tmp_path / "f", [b"x" * n for n in range(1, 10)])
    with pytest.raises(ContextChangedError, match=r'"f".*changes while it is read'):
        _scan(tmp_path)


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from offload_client.context.entries import tree_entries
from offload_client.context.scan import scan_context
from offload_core.errors import ContextError
os.setgid(65534)
os.setuid(65534)
try:
    found = scan_context(Path(sys.argv[1]), exclude=sys.argv[2:], warn=print)
    print([entry.path for entry in tree_entries(found)])
except ContextError as error:
    print(error.message)
"""


def _scan_unprivileged(root: Path, *exclude: str) -> str:
    # Root reads everything, so that another user has to try. pytest's directories are private.
    for directory in (root, *root.parents[:3]):
        if directory.stat().st_uid == os.getuid() and directory != Path("/tmp"):
            directory.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(root), *exclude],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_unreadable_file_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    assert _scan_unprivileged(tmp_path) == (
        'cannot read "secret" of the build context: Permission denied'
    )
    assert _scan_unprivileged(tmp_path, "secret") == "[]"


def test_unreadable_directory_is_an_error_unless_it_is_excluded(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    message = 'cannot read "private" of the build context: Permission denied'
    assert _scan_unprivileged(tmp_path) == message
    assert _scan_unprivileged(tmp_path, "private") == "[]"
    assert _scan_unprivileged(tmp_path, "private", "!private/x") == "[]"


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=200), min_size=1))
def test_digests_are_those_of_the_contents(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name, data in contents.items():
        (root / name).write_bytes(data)
    found = _scan(root)
    assert {name: entry.sha256 for name, entry in found.items()} == {
        name: hashlib.sha256(data).digest() for name, data in contents.items()
    }


def test_importing_the_package_stays_cheap() -> None:
    code = (
        "import sys; import offload_client.context.scan, offload_client.context.reader, "
        "offload_client.context.source, offload_client.context.ignorefile; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "pyfastcdc" not in loaded
    assert not loaded & {
        "sqlite3",
        "grpc",
        "click",
        "structlog",
        "asyncio",
        "logging",
        "google.protobuf",
    }
