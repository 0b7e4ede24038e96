"""Two sides of a directory: what people and containers do to them, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from offload_client.sessions import backoff
from offload_core.errors import ContextError, QuotaExceededError
from offload_core.treesync.replica import Limits
from tests.fixtures.syncpair import SyncPair
from tests.fixtures.syncservice import names, until


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[SyncPair]:
    async with SyncPair(tmp_path) as pair:
        yield pair


async def test_everything_travels_as_it_is(pair: SyncPair) -> None:
    (pair.here / "empty" / "deep").mkdir(parents=True)
    (pair.here / "program").write_text("#!/bin/sh")
    (pair.here / "program").chmod(0o750)
    os.utime(pair.here / "program", ns=(1, 1_600_000_000_123_456_789))
    os.link(pair.here / "program", pair.here / "hard")
    (pair.here / "dangling").symlink_to("/nowhere/../x")
    odd = os.fsdecode(b"odd \xff\n name")
    (pair.here / odd).write_text("")
    await pair.start()
    assert (pair.there / "empty" / "deep").is_dir()
    status = (pair.there / "program").stat()
    assert stat.S_IMODE(status.st_mode) == 0o750
    assert status.st_mtime_ns == 1_600_000_000_123_456_789
    assert (pair.there / "hard").stat().st_nlink == 1
    assert str((pair.there / "dangling").readlink()) == "/nowhere/../x"
    assert (pair.there / odd).exists()


async def test_edit_is_seen_in_a_tree_of_20000_files(pair: SyncPair) -> None:
    for number in range(200):
        folder = pair.here / f"d{number}"
        folder.mkdir()
        for name in range(100):
            (folder / f"f{name}").write_text(f"{number} {name}")
    await pair.start()
    assert sum(1 for path in pair.there.rglob("f*")) == 20_000
    edited = pair.here / "d150" / "f50"
    edited.write_text("edited here")
    await until(lambda: (pair.there / "d150" / "f50").read_text() == "edited here")
    (pair.there / "d150" / "f51").write_text("edited there")
    await until(lambda: (pair.here / "d150" / "f51").read_text() == "edited there")


async def test_large_file_takes_bounded_memory_and_only_its_changes_travel(
    pair: SyncPair,
) -> None:
    await pair.start()
    large = pair.here / "large"
    with large.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(4 << 20))
    tracemalloc.start()
    try:
        async with asyncio.timeout(100):
            await pair.settle()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (pair.there / "large").stat().st_size == 256 << 20
    assert peak < 128 << 20
    received = pair.directory.received_bytes
    with (pair.there / "large").open("r+b") as file:
        file.seek(100 << 20)
        file.write(b"changed in the middle")
    await pair.settle()
    with large.open("rb") as file:
        file.seek(100 << 20)
        assert file.read(21) == b"changed in the middle"
    assert pair.directory.received_bytes - received < 8 << 20


async def test_both_versions_of_a_conflict_are_kept_on_both_sides(pair: SyncPair) -> None:
    (pair.here / "file").write_text("base")
    await pair.start()
    pair.reachable = False
    pair.cut()
    (pair.here / "file").write_text("mine")
    (pair.there / "file").write_text("theirs")
    pair.reachable = True
    await pair.settle()
    for side in (pair.here, pair.there):
        assert (side / "file").read_text() == "mine"
        (conflict,) = side.glob("file.conflict-*")
        assert conflict.read_text() == "theirs"
    assert any("file.conflict-" in text for text in pair.warnings)


async def test_deletion_does_not_win_over_a_change(pair: SyncPair) -> None:
    (pair.here / "d").mkdir()
    for name in ("one", "other", "both"):
        (pair.here / "d" / name).write_text("base")
    await pair.start()
    pair.reachable = False
    pair.cut()
    shutil.rmtree(pair.here / "d")
    (pair.there / "d" / "one").write_text("changed")
    pair.reachable = True
    await pair.settle()
    for side in (pair.here, pair.there):
        assert names(side / "d") == ["one"]
        assert (side / "d" / "one").read_text() == "changed"


async def test_read_only_directory_takes_nothing_from_the_session(tmp_path: Path) -> None:
    async with SyncPair(tmp_path) as pair:
        (pair.here / "file").write_text("mine")
        await pair.start(two_way=False)
        (pair.there / "file").write_text("theirs")
        (pair.there / "new").write_text("theirs")
        await pair.settle()
        assert names(pair.here) == ["file"]
        assert (pair.here / "file").read_text() == "mine"
        assert (pair.there / "file").read_text() == "mine"


async def test_ignored_files_stay_where_they_are(pair: SyncPair) -> None:
    (pair.here / ".offloadignore").write_text("# dependencies\nnode_modules\n*.log\n!keep.log\n")
    (pair.here / "node_modules").mkdir()
    (pair.here / "node_modules" / "x").write_text("here")
    (pair.here / "a.log").write_text("")
    (pair.here / "keep.log").write_text("")
    await pair.start()
    assert names(pair.there) == [".offloadignore", "keep.log"]
    (pair.there / "node_modules").mkdir()
    (pair.there / "node_modules" / "x").write_text("there")
    await pair.settle()
    assert (pair.here / "node_modules" / "x").read_text() == "here"
    # The rules change: what was ignored on both sides is a conflict now, and nothing is deleted.
    (pair.here / ".offloadignore").write_text("*.log\n")
    await until(lambda: list((pair.here / "node_modules").glob("x.conflict-*")))
    await pair.settle()
    assert (pair.there / "node_modules" / "x").read_text() == "here"
    (conflict,) = (pair.here / "node_modules").glob("x.conflict-*")
    assert conflict.read_text() == "there"
    assert (pair.there / "keep.log").exists()


async def test_directory_with_ignored_files_is_not_deleted(pair: SyncPair) -> None:
    (pair.here / ".offloadignore").write_text("**/*.o\n")
    (pair.here / "d").mkdir()
    (pair.here / "d" / "source").write_text("")
    await pair.start()
    (pair.there / "d" / "made.o").write_text("")
    shutil.rmtree(pair.here / "d")
    await pair.settle()
    assert names(pair.there / "d") == ["made.o"]
    assert names(pair.here / "d") == []


async def test_root_that_vanishes_is_not_a_deletion(pair: SyncPair) -> None:
    (pair.here / "file").write_text("kept")
    await pair.start()
    pair.here.rename(pair.here.with_name("elsewhere"))
    pair.here.mkdir()
    (pair.here / "other").write_text("")
    with pytest.raises(Exception, match="moved or deleted"):
        await pair.settle()
    assert (pair.there / "file").read_text() == "kept"
    await until(lambda: any("moved or deleted" in text for text in pair.warnings))


async def test_engine_that_was_lost_with_its_copy_deletes_nothing_here(pair: SyncPair) -> None:
    (pair.here / "file").write_text("kept")
    await pair.start()
    pair.reachable = False
    pair.cut()
    async with pair.turn:
        await pair.restart_node()
    shutil.rmtree(pair.place)
    pair.reachable = True
    await pair.settle()
    assert (pair.here / "file").read_text() == "kept"
    assert (pair.there / "file").read_text() == "kept"


async def test_lost_connection_loses_nothing(pair: SyncPair) -> None:
    await pair.start()
    for number in range(20):
        (pair.here / f"h{number}").write_text("here" * 1000)
        (pair.there / f"t{number}").write_text("there" * 1000)
        await asyncio.sleep(0.002 * number)
        pair.cut()
    await pair.settle()
    expected = sorted(f"{side}{number}" for side in "ht" for number in range(20))
    assert names(pair.here) == names(pair.there) == expected
    assert pair.calls > 1


async def test_breaks_do_not_add_up_once_it_was_connected(
    pair: SyncPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With rests that grew from one break to the next, the last would be of minutes.
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 1000.0)
    await pair.start()
    for _ in range(12):
        pair.cut()
        await pair.settle()
    assert pair.calls > 12


@pytest.mark.parametrize("target", ["..", "/"])
async def test_link_in_place_of_a_directory_leads_nobody_out(
    pair: SyncPair, tmp_path: Path, target: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    (pair.here / "d").mkdir()
    (pair.here / "d" / "file").write_text("inside")
    await pair.start()
    link = str(outside) if target == "/" else "../outside"
    # The session replaces the directory by a link, then tries to write through it.
    shutil.rmtree(pair.there / "d")
    (pair.there / "d").symlink_to(link)
    await pair.settle()
    assert str((pair.here / "d").readlink()) == link
    # This side does the same to the session's.
    (pair.here / "d").unlink()
    (pair.here / "d").mkdir()
    (pair.here / "d" / "file").write_text("again")
    (pair.here / "d" / "new").write_text("new")
    await pair.settle()
    assert (pair.there / "d" / "new").read_text() == "new"
    assert names(outside) == ["file"]
    assert (outside / "file").read_text() == "safe"


async def test_sockets_and_pipes_are_left_out(pair: SyncPair) -> None:
    os.mkfifo(pair.here / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(pair.here / "sock"))
        (pair.here / "file").write_text("")
        await pair.start()
    assert names(pair.there) == ["file"]


async def test_too_large_directory_is_refused_with_a_sentence(tmp_path: Path) -> None:
    async with SyncPair(tmp_path, limits=Limits(10, 1 << 20)) as pair:
        for number in range(11):
            (pair.here / f"f{number}").write_text("")
        with pytest.raises(QuotaExceededError, match="more than 10 files"):
            await pair.start()


async def test_session_that_makes_too_many_files_does_not_fill_this_disk(tmp_path: Path) -> None:
    async with SyncPair(tmp_path, limits=Limits(10, 1 << 20)) as pair:
        await pair.start()
        for number in range(50):
            (pair.there / f"f{number}").write_text("")
        await until(lambda: bool(pair.warnings))
        assert len(names(pair.here)) <= 10


async def test_session_with_a_file_too_large_does_not_fill_this_disk(tmp_path: Path) -> None:
    async with SyncPair(tmp_path, limits=Limits(10, 8 << 20)) as pair:
        await pair.start()
        with (pair.there / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        await until(lambda: bool(pair.warnings))
        assert names(pair.here) == []


async def test_malformed_ignore_file_is_refused(pair: SyncPair) -> None:
    (pair.here / ".offloadignore").write_text("[\n")
    with pytest.raises(ContextError):
        await pair.start()


async def test_file_that_grows_all_the_time_does_not_hold_up_the_others(pair: SyncPair) -> None:
    await pair.start()
    log = pair.here / "log"
    with log.open("w") as file:
        for number in range(50):
            file.write(f"line {number}\n" * 100)
            file.flush()
            (pair.here / f"f{number}").write_text("x")
            await asyncio.sleep(0.003)
    await pair.settle()
    assert (pair.there / "log").read_text() == log.read_text()
    assert len(names(pair.there)) == 51
