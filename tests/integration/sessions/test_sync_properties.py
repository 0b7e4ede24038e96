"""Whatever happens on both sides: they become equal, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_core.treesync.rules import TEMPORARY
from offload_core.treesync.tree import _rename
from tests.fixtures.syncpair import SyncPair

NAMES = ("a", "b", "c")
SETTLE_SECONDS = 60.0

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
sides = st.sampled_from(("here", "there"))
changes = st.one_of(
    st.tuples(st.just("write"), sides, paths),
    st.tuples(st.just("write"), sides, paths),
    st.tuples(st.just("delete"), sides, paths),
    st.tuples(st.just("mkdir"), sides, paths),
    st.tuples(st.just("rename"), sides, paths, paths),
    st.tuples(st.just("chmod"), sides, paths, st.sampled_from((0o600, 0o755, 0o700))),
    st.tuples(st.just("symlink"), sides, paths, st.sampled_from(("a", "../x", "/etc/passwd"))),
    st.tuples(st.just("touch"), sides, paths, st.integers(1, 10**9)),
)
meanwhile = st.sampled_from((("settle",), ("pause",), ("cut",), ("both-settle",)))
histories = st.lists(st.one_of(changes, changes, changes, meanwhile), max_size=25)


class Actor:
    """Changes a tree so that what it destroys is known, whatever else happens to the tree."""

    def __init__(self, scratch: Path) -> None:
        self.trash = scratch / "trash"
        self.trash.mkdir()
        self.numbers = itertools.count()
        self.written: set[bytes] = set()
        self.destroyed: set[bytes] = set()

    def write(self, path: Path) -> None:
        content = b"content %d" % next(self.numbers)
        new = self.trash / f"new{next(self.numbers)}"
        new.write_bytes(content)
        self.discard(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(new, path)
        new.unlink()
        self.written.add(content)

    def discard(self, path: Path) -> None:
        gone = self.trash / f"gone{next(self.numbers)}"
        try:
            path.rename(gone)
        except FileNotFoundError:
            return
        found = gone.rglob("*") if gone.is_dir() and not gone.is_symlink() else [gone]
        for file in found:
            if file.is_file() and not file.is_symlink():
                self.destroyed.add(file.read_bytes())

    def rename(self, old: Path, new: Path) -> None:
        if not os.path.lexists(old):
            return
        self.discard(new)
        new.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        try:
            _rename(fd, str(old), str(new), 1)
        finally:
            os.close(fd)

    def act(self, root: Path, change: tuple[object, ...]) -> None:
        kind, _, name, *rest = change
        path = root / str(name)
        # Where a link or a file is in the way, or the other side was faster.
        with contextlib.suppress(OSError):
            if not os.path.realpath(path.parent).startswith(str(root)):
                return
            if kind == "write":
                self.write(path)
            elif kind == "delete":
                self.discard(path)
            elif kind == "mkdir":
                path.mkdir(parents=True)
            elif kind == "rename":
                target = root / str(rest[0])
                if os.path.realpath(target.parent).startswith(str(root)):
                    self.rename(path, target)
            elif kind == "chmod":
                if not path.is_symlink():
                    path.chmod(rest[0])  # type: ignore[arg-type]
            elif kind == "touch":
                if path.is_file() and not path.is_symlink():
                    os.utime(path, ns=(0, rest[0] * 1_000_003))  # type: ignore[operator]
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(str(rest[0]))


def listed(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(folder, name)
            status = path.lstat()
            key = str(path.relative_to(root))
            assert TEMPORARY not in key
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("link", str((path).readlink()))
            elif stat.S_ISDIR(status.st_mode):
                found[key] = ("directory", stat.S_IMODE(status.st_mode))
            else:
                mode = stat.S_IMODE(status.st_mode)
                found[key] = ("file", mode, status.st_mtime_ns, path.read_bytes())
    return found


async def play(history: list[tuple[object, ...]], *, concurrent: bool) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="offload-sync-"))
    actor = Actor(scratch)
    try:
        async with SyncPair(scratch) as pair:
            await pair.start()
            for change in history:
                if change[0] in ("settle", "both-settle"):
                    await pair.settle()
                elif change[0] == "cut":
                    pair.cut()
                elif change[0] == "pause":
                    await asyncio.sleep(0.015)
                else:
                    actor.act(pair.here if change[1] == "here" else pair.there, change)
                    if concurrent:
                        await asyncio.sleep(0)
            # What was done while both sides were compared may take another time.
            async with asyncio.timeout(SETTLE_SECONDS):
                while True:
                    await pair.settle()
                    here, there = listed(pair.here), listed(pair.there)
                    if here == there:
                        break
                    await asyncio.sleep(0.1)
            kept = {item[-1] for item in here.values() if item[0] == "file"}
            assert actor.written - actor.destroyed <= kept
            assert not [text for text in pair.warnings if text.startswith("node:")]
    finally:
        shutil.rmtree(scratch)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories)
def test_both_sides_become_equal_and_nothing_is_lost(history: list[tuple[object, ...]]) -> None:
    asyncio.run(play(history, concurrent=True))
