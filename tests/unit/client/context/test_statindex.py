"""The index saves reading and is never believed when it could be wrong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_client.context import digests, indexfile, statindex
from offload_client.context.entries import tree_entries
from offload_client.context.hashing import FileHasher
from offload_client.context.indexrows import FileTable, IndexedFile, KnownFiles
from offload_client.context.scan import scan_context
from offload_client.context.statindex import GRANULARITY_NS, StatIndex
from offload_core.chunklist import CHUNKED_ABOVE_BYTES, decode_chunks

OLD_NS = GRANULARITY_NS + 1_000_000_000


@pytest.fixture(autouse=True)
def _always_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "DIRECT_FILES", -1)


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths of the files that were really read."""
    read: list[str] = []
    hash_file = FileHasher.hash_file

    def recording(self: FileHasher, fd: int, name: str, path: str, status: os.stat_result):  # type: ignore[no-untyped-def]
        read.append(path)
        return hash_file(self, fd, name, path, status)

    monkeypatch.setattr(FileHasher, "hash_file", recording)
    return read


def _later(monkeypatch: pytest.MonkeyPatch, by_ns: int = OLD_NS) -> None:
    """Let the next scans happen later, when the files' time stamps are old."""
    real = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: real() + by_ns)


def _scan(root: Path, database: Path, **options: object) -> dict[str, bytes | None]:
    with StatIndex(database, root) as index:
        found = scan_context(root, index=index, warn=print, **options)  # type: ignore[arg-type]
        return {entry.path: entry.sha256 for entry in tree_entries(found)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    (root / "d").mkdir(parents=True)
    (root / "f").write_bytes(b"one")
    (root / "d" / "g").write_bytes(b"two")
    return root


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "index.db"


def test_unchanged_files_are_not_read_again(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    first = _scan(root, database)
    assert sorted(read_files) == ["d/g", "f"]
    assert _scan(root, database) == first
    assert len(read_files) == 2


def test_only_the_changed_file_is_read_again(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    _scan(root, database)
    read_files.clear()
    (root / "f").write_bytes(b"another")
    assert _scan(root, database)["f"] == hashlib.sha256(b"another").digest()
    assert read_files == ["f"]


def test_file_written_just_before_the_scan_is_read_again(
    root: Path, database: Path, read_files: list[str]
) -> None:
    _scan(root, database)
    read_files.clear()
    _scan(root, database)
    assert sorted(read_files) == ["d/g", "f"]


def test_restored_mtime_and_size_hide_no_change(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    _scan(root, database)
    before = (root / "f").stat()
    (root / "f").write_bytes(b"eno")
    os.utime(root / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _scan(root, database)["f"] == hashlib.sha256(b"eno").digest()


def test_file_of_the_future_is_never_believed(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    far = time.time_ns() + 10**18
    os.utime(root / "f", ns=(far, far))
    _scan(root, database)
    read_files.clear()
    _scan(root, database)
    assert read_files == ["f"]


steps = st.lists(
    st.tuples(
        st.sampled_from(["rewrite", "replace", "append", "scan", "chmod"]),
        st.sampled_from(["a", "b"]),
        st.binary(min_size=3, max_size=3),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.booleans())
def test_no_stale_digest_whatever_happens_to_the_files(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes]], later: bool
) -> None:
    base = tmp_path_factory.mktemp("steps")
    root = base / "context"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_bytes(b"abc")
    stamp = 1_600_000_000_000_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "DIRECT_FILES", -1)
        if later:
            # The scans believe that everything was written long ago; only the ctime can tell.
            real = time.time_ns
            patch.setattr(digests.time, "time_ns", lambda: real() + OLD_NS)
        for step, name, data in [*steps, ("scan", "a", b"")]:
            path = root / name
            if step == "scan":
                expected = {item.name: _digest(item) for item in root.iterdir()}
                assert _scan(root, base / "index.db") == expected
                # One tick of the clock, which a scan "much later" pretends away.
                time.sleep(0.011 if later else 0)
                continue
            if step == "rewrite":
                path.write_bytes(data)
            elif step == "append":
                path.write_bytes(path.read_bytes() + data)
            elif step == "chmod":
                path.chmod(0o600)
            else:
                (root / "new").write_bytes(data)
                (root / "new").replace(path)
            os.utime(path, ns=(stamp, stamp))


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def test_database_that_is_garbage_is_replaced(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    database.parent.mkdir()
    database.write_bytes(b"this is no database" * 1000)
    expected = {"d": None, "f": _digest(root / "f"), "d/g": _digest(root / "d" / "g")}
    assert _scan(root, database) == expected
    assert _scan(root, database) == expected
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM directories").fetchone() == (2,)
    connection.close()


def test_truncated_database_is_no_error(root: Path, database: Path) -> None:
    for number in range(300):
        (root / f"n{number}").write_bytes(b"%d" % number)
    first = _scan(root, database)
    size = database.stat().st_size
    os.truncate(database, size // 2)
    assert _scan(root, database) == first
    assert _scan(root, database) == first


def test_damaged_row_counts_as_absent(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    first = _scan(root, database)
    read_files.clear()
    with sqlite3.connect(database) as connection:
        (data,) = connection.execute("SELECT data FROM directories WHERE path = X''").fetchone()
        at = data.index(_digest(root / "f"))
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        connection.execute("UPDATE directories SET data = ? WHERE path = X''", (damaged,))
    connection.close()
    assert _scan(root, database) == first
    assert read_files == ["f"]


def test_locked_database_is_no_error(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    monkeypatch.setattr(indexfile, "_LOCK_WAIT_SECONDS", 0.05)
    first = _scan(root, database)
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    (root / "f").write_bytes(b"new")
    with StatIndex(database, root) as index:
        found = scan_context(root, index=index, warn=print)
        second = {entry.path: entry.sha256 for entry in tree_entries(found)}
        assert "locked" in index.problem
    connection.execute("ROLLBACK")
    connection.close()
    assert second == first | {"f": hashlib.sha256(b"new").digest()}


def test_database_in_a_place_that_cannot_be_made_is_no_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with StatIndex(tmp_path / "file" / "index.db", root) as index:
        found = list(tree_entries(scan_context(root, index=index, warn=print)))
        assert index.problem
    assert len(found) == 3


def test_two_roots_share_a_database(tmp_path: Path, database: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(name.encode())
        assert _scan(tmp_path / name, database) == {"f": hashlib.sha256(name.encode()).digest()}
    assert _scan(tmp_path / "one", database) == {"f": hashlib.sha256(b"one").digest()}


def test_small_context_does_not_touch_the_database(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "DIRECT_FILES", 256)
    _scan(root, database)
    assert not database.exists()


def test_large_file_alone_is_worth_the_database(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "DIRECT_FILES", 256)
    _later(monkeypatch)
    (root / "large").write_bytes(bytes(5 << 20))
    _scan(root, database)
    read_files.clear()
    _scan(root, database)
    assert "large" not in read_files


def test_filtered_scan_keeps_what_is_known_of_other_files(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    (root / "other").write_bytes(b"")
    _scan(root, database, include=["f"])
    _scan(root, database, include=["other"])
    read_files.clear()
    _scan(root, database)
    assert read_files == ["d/g"]


def test_vanished_files_and_unused_directories_are_forgotten(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    _scan(root, database)
    (root / "f").rename(root / "renamed")
    _scan(root, database)
    with StatIndex(database, root) as index:
        assert set(dict(index.directory("").files())) == {"renamed"}
    day = statindex._today()
    monkeypatch.setattr(statindex, "_today", lambda: day + statindex.KEEP_DAYS + 1)
    (root / "d" / "g").write_bytes(b"new")
    _scan(root, database, include=["d"])
    with StatIndex(database, root) as index:
        assert len(index.directory("")) == 0
        assert set(dict(index.directory("d").files())) == {"g"}


def _table(files: dict[str, IndexedFile]) -> FileTable:
    table = FileTable()
    for name, file in files.items():
        table.add(name, file)
    return table


def test_row_survives_packing_with_attributes(tmp_path: Path) -> None:
    files = {
        "b": IndexedFile(-1, -2, 3, 2**64 - 1, b"\2" * 32, {"user.x": b"", "user.y": b"\0v"}),
        "a": IndexedFile(1, 2, 3, 4, b"\1" * 32),
        os.fsdecode(b"\xff"): IndexedFile(0, 0, 0, 0, b"\3" * 32),
    }
    with StatIndex(tmp_path / "index.db", tmp_path) as index:
        assert len(index.directory("x")) == 0
        index.remember("x", _table(files))
        index.remember("empty", FileTable())
    with StatIndex(tmp_path / "index.db", tmp_path) as index:
        assert dict(index.directory("x").files()) == files
        assert index.directory("x").xattrs == {"b": {"user.x": b"", "user.y": b"\0v"}}
        assert len(index.directory("empty")) == 0


def _status(size: int, mtime: int, ctime: int, inode: int) -> os.stat_result:
    return os.stat_result(
        (0o100644, inode, 1, 1, 0, 0, size, 0, 0, 0, 0.0, 0.0, 0.0, 0, mtime, ctime)
    )


names = st.text(alphabet="abé", min_size=1, max_size=3)
numbers = st.tuples(*[st.integers(min_value=0, max_value=2)] * 4)


@given(
    st.dictionaries(names, numbers, max_size=12),
    st.dictionaries(names, numbers, max_size=12),
    st.integers(min_value=1, max_value=5),
)
def test_digest_is_found_for_the_same_name_and_status_and_for_nothing_else(
    known: dict[str, tuple[int, int, int, int]],
    asked: dict[str, tuple[int, int, int, int]],
    batch: int,
) -> None:
    def digest(name: str, status: tuple[int, ...]) -> bytes:
        return hashlib.sha256(repr((name, status)).encode()).digest()

    rows = {name: IndexedFile(*of, digest(name, of)) for name, of in known.items()}
    row = KnownFiles(_table(rows).pack())
    for files in (asked, known):
        ordered = sorted(files)
        found: list[bytes | None] = []
        for start in range(0, len(ordered), batch):
            part = ordered[start : start + batch]
            found += row.digests(part, [_status(*files[name]) for name in part])
        assert found == [
            digest(name, files[name]) if known.get(name) == files[name] else None
            for name in ordered
        ]


PROCESS = """
import sys
from pathlib import Path
from offload_client.context import digests
from offload_client.context.scan import scan_context
from offload_client.context.statindex import StatIndex
digests.DIRECT_FILES = -1
digests.GRANULARITY_NS = -(10**12)
root, database = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(5):
    with StatIndex(database, root) as index:
        list(scan_context(root, index=index, warn=print))
        assert not index.problem, index.problem
"""


def test_processes_share_a_database(root: Path, database: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(root), str(database)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), errors
    with StatIndex(database, root) as index:
        assert len(index.directory("f")) == 0
        assert set(dict(index.directory("").files())) == {"f"}


LARGE = CHUNKED_ABOVE_BYTES + 1


def _chunk_lists(database: Path) -> dict[bytes, bytes]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("SELECT sha256, data FROM chunk_lists"))


def test_chunk_list_of_a_large_file_is_remembered(
    root: Path, database: Path, read_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    (root / "large").write_bytes(os.urandom(LARGE))
    digest = _scan(root, database)["large"]
    assert digest is not None
    read_files.clear()
    assert _scan(root, database)["large"] == digest
    assert read_files == []
    with StatIndex(database, root) as index:
        data = index.chunk_list(digest)
        assert data is not None
        assert hashlib.sha256(data).digest() == digest
        assert sum(chunk.size_bytes for chunk in decode_chunks(data, LARGE)) == LARGE
        assert index.chunk_list(bytes(32)) is None


def test_damaged_chunk_list_counts_as_absent(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    (root / "large").write_bytes(bytes(LARGE))
    digest = _scan(root, database)["large"]
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE chunk_lists SET data = X'00'")
    with StatIndex(database, root) as index:
        assert digest is not None
        assert index.chunk_list(digest) is None


def test_asking_for_a_chunk_list_makes_no_database(root: Path, database: Path) -> None:
    with StatIndex(database, root) as index:
        assert index.chunk_list(bytes(32)) is None
    assert not database.exists()


def test_chunk_lists_in_use_are_kept_and_others_forgotten(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    for name in ("kept", "dropped"):
        (root / name).write_bytes(os.urandom(LARGE))
    first = _scan(root, database)
    assert set(_chunk_lists(database)) == {first["kept"], first["dropped"]}
    (root / "dropped").unlink()
    day = statindex._today()
    for days in (20, 40):
        monkeypatch.setattr(statindex, "_today", lambda days=days: day + days)
        (root / "f").write_bytes(b"%d" % days)
        _scan(root, database)
    assert set(_chunk_lists(database)) == {first["kept"]}


def test_chunk_lists_have_a_bound_and_the_longest_unused_go_first(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statindex, "CHUNK_LISTS_BYTES", 100)
    day = statindex._today()
    lists = [bytes([number]) * 36 for number in range(4)]
    for number, data in enumerate(lists):
        monkeypatch.setattr(statindex, "_today", lambda number=number: day + number)
        with StatIndex(database, root) as index:
            index.directory("")
            index.remember_chunk_list(hashlib.sha256(data).digest(), data)
    assert set(_chunk_lists(database).values()) == set(lists[2:])


def test_database_of_an_older_format_is_replaced(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _later(monkeypatch)
    database.parent.mkdir()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE directories (old BLOB)")
        connection.execute("PRAGMA user_version = 1")
    _scan(root, database)
    with StatIndex(database, root) as index:
        assert set(dict(index.directory("").files())) == {"f"}
        assert not index.problem
