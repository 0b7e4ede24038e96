"""The index saves reading and is never believed when it could be wrong."""

from __future__ import annotations

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

from offload_client.context import digests, statindex
from offload_client.context.hashing import FileHasher
from offload_client.context.scan import scan_context
from offload_client.context.statindex import GRANULARITY_NS, IndexedFile, StatIndex

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
        return {entry.path: entry.sha256 for entry in found}


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


def test_database_that_is_garbage_is_replaced(root: Path, database: Path) -> None:
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
    monkeypatch.setattr(statindex, "_LOCK_WAIT_SECONDS", 0.05)
    first = _scan(root, database)
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    (root / "f").write_bytes(b"new")
    with StatIndex(database, root) as index:
        found = scan_context(root, index=index, warn=print)
        second = {entry.path: entry.sha256 for entry in found}
        assert "locked" in index.problem
    connection.execute("ROLLBACK")
    connection.close()
    assert second == first | {"f": hashlib.sha256(b"new").digest()}


def test_database_in_a_place_that_cannot_be_made_is_no_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with StatIndex(tmp_path / "file" / "index.db", root) as index:
        found = list(scan_context(root, index=index, warn=print))
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
    _scan(root, database)
    (root / "f").rename(root / "renamed")
    _scan(root, database)
    with StatIndex(database, root) as index:
        assert set(index.directory("")) == {"renamed"}
    day = statindex._today()
    monkeypatch.setattr(statindex, "_today", lambda: day + statindex.KEEP_DAYS + 1)
    (root / "d" / "g").write_bytes(b"new")
    _scan(root, database, include=["d"])
    with StatIndex(database, root) as index:
        assert index.directory("") == {}
        assert set(index.directory("d")) == {"g"}


def test_row_survives_packing_with_attributes(tmp_path: Path) -> None:
    files = {
        "a": IndexedFile(1, 2, 3, 4, 5, b"\1" * 32),
        "b": IndexedFile(-1, -2, 3, 2**64 - 1, 5, b"\2" * 32, {"user.x": b"", "user.y": b"\0v"}),
        os.fsdecode(b"\xff"): IndexedFile(0, 0, 0, 0, 0, b"\3" * 32),
    }
    with StatIndex(tmp_path / "index.db", tmp_path) as index:
        assert index.directory("x") == {}
        index.remember("x", files)
        index.remember("empty", {})
    with StatIndex(tmp_path / "index.db", tmp_path) as index:
        assert index.directory("x") == files
        assert index.directory("empty") == {}


PROCESS = """
import sys
from pathlib import Path
from offload_client.context import digests
from offload_client.context.scan import scan_context
from offload_client.context.statindex import StatIndex
digests.DIRECT_FILES = -1
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
        assert index.directory("f") == {}
        assert set(index.directory("")) == {"f"}
