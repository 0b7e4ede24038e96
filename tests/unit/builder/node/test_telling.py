"""The rules of sticky times against a model of BuildKit's differ, and what they cost.

The model is fsutil's: it compares size, mtime, mode and link with the copy of an earlier transfer
and asks for the content of what differs. BuildKit may keep several copies under one key, and it
looks at the copy while it changes it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_builder.node.stickytimes import StickyTimes
from offload_builder.node.telling import NewPage, Telling, told_entries
from offload_builder.node.toldtables import ListingKey, ToldPage
from offload_core.errors import UsageError
from offload_core.filemode import MODE_DIR, MODE_SYMLINK, is_regular
from tests.fixtures.listings import (
    Node,
    Tree,
    deep,
    encoded,
    file,
    folder,
    hardlink,
    ordered,
    symlink,
    with_parents,
)

NAME = "context"


@pytest.fixture
def times(tmp_path):
    table = StickyTimes(tmp_path / "times.db")
    yield table
    table.close()


@dataclass(eq=False)
class Inode:
    """A file on the model's disk."""

    mode: int
    size: int
    modified_at_ns: int
    content: bytes | None
    target: str = ""


class Copy:
    """BuildKit's copy of a local source."""

    def __init__(self) -> None:
        self.disk: dict[str, Inode] = {}

    def walk(self, path: str, seen: dict[int, str]) -> tuple[int, int, int, str]:
        """What fsutil says of a path; `seen` has the inodes of the paths before."""
        inode = self.disk[path]
        if inode.mode & MODE_DIR:
            return inode.mode, 0, 0, ""
        first = seen.setdefault(id(inode), path)
        if inode.target:
            return inode.mode, inode.size, inode.modified_at_ns, inode.target
        if first != path:
            return inode.mode, 0, inode.modified_at_ns, first
        return inode.mode, inode.size, inode.modified_at_ns, ""

    def take(self, pages: list[ToldPage], tree: Tree, *, ahead: bool) -> list[str]:
        """Take a listing; the paths whose content was asked for.

        Args:
            pages: what is told.
            tree: has the content.
            ahead: the copy is looked at before anything in it is changed.
        """
        told = [entry for page in pages for entry in told_entries(page)]
        old, seen = Copy(), {}
        old.disk = dict(self.disk)
        before = {path: old.walk(path, seen) for path in sorted(old.disk, key=_key)}
        listed = {entry.path for entry in told}
        self.disk = {path: inode for path, inode in self.disk.items() if path in listed}
        asked, live = [], {}
        for entry in told:
            was = before.get(entry.path)
            if was is not None and not ahead:
                was = self.walk(entry.path, live)
            now = (entry.mode, entry.size_bytes, entry.modified_at_ns, entry.link)
            if entry.mode & MODE_DIR:
                now = (entry.mode, 0, 0, "")
            if was == now:
                continue
            if is_regular(entry.mode) and entry.link:
                inode = self.disk[entry.link]
                inode.modified_at_ns, inode.mode = entry.modified_at_ns, entry.mode
                self.disk[entry.path] = inode
                live.setdefault(id(inode), entry.path)
                continue
            inode = Inode(entry.mode, entry.size_bytes, entry.modified_at_ns, None, entry.link)
            if entry.content_size >= 0:
                asked.append(entry.path)
                inode.content = tree[entry.path].content
            self.disk[entry.path] = inode
            live[id(inode)] = entry.path
        return asked

    def check(self, tree: Tree) -> None:
        """The copy is the tree."""
        assert set(self.disk) == set(tree)
        for path, node in tree.items():
            inode = self.disk[path]
            assert inode.mode == node.full_mode
            if node.full_mode & MODE_SYMLINK:
                assert inode.target == node.link
            elif node.link:
                assert inode is self.disk[node.link], f"{path} is a stale link"
            else:
                assert inode.content == node.content, f"{path} is stale"


def _key(path: str) -> str:
    return path.replace("/", "\0")


class World:
    """A node and BuildKit."""

    def __init__(self, times: StickyTimes, base: str = "k") -> None:
        self.times = times
        self.base = base
        self.generation = times.generation(base)
        self.copies: list[Copy] = [Copy()]
        self.taken = 0

    def key(self) -> ListingKey:
        generation = self.times.generation(self.base)
        if generation != self.generation:
            self.generation = generation
            self.copies = [Copy()]
        return self.key_in_use

    def tell(self, tree: Tree, cuts: set[str]) -> tuple[Telling, list[ToldPage]]:
        telling = Telling(self.times, self.key())
        telling.open()
        told = []
        for page in encoded(tree, lambda path, count: path in cuts):
            new = NewPage(page.digest, page.data, page.times)
            if not telling.needs_data(page.digest):
                told += telling.take([page.digest])
                continue
            if telling.told_before(page.digest):
                new = new._replace(times_ns=None)
            told += telling.take([new])
            self.taken += 1
        return telling, told

    def build(self, tree: Tree, cuts: set[str] = frozenset(), copy: int = 0, *, ahead=True):
        telling, told = self.tell(tree, cuts)
        telling.finish()
        while len(self.copies) <= copy:
            self.copies.append(Copy())
        asked = self.copies[copy].take(told, tree, ahead=ahead)
        if telling.begun:
            self.times.settle(self.key_in_use)
        self.copies[copy].check(tree)
        return asked

    @property
    def key_in_use(self) -> ListingKey:
        return ListingKey(f"{self.base}-{self.generation}", NAME)

    def give_up(self, tree: Tree, cuts: set[str], *, after_end: bool) -> None:
        """BuildKit is told something and does not take it to its end; its copy is in any state."""
        telling, told = self.tell(tree, cuts)
        if after_end:
            telling.finish()
        for copy in self.copies:
            copy.take(told, tree, ahead=True)
        if telling.begun:
            self.times.retire(self.key_in_use.shared_key)


PATHS = ["a", "a/x", "a.b", "b", "b/c", "c", "d"]
TIMES = st.integers(100, 102)
REGULAR = st.builds(
    file,
    st.sampled_from([b"1", b"2"]),
    mode=st.sampled_from([0o644, 0o644, 0o755]),
    modified_at_ns=TIMES,
)
EDIT = st.tuples(
    st.sampled_from(PATHS),
    st.one_of(
        REGULAR,
        REGULAR,
        st.builds(hardlink, st.sampled_from(PATHS)),
        st.none(),
        st.builds(file, st.just(b""), modified_at_ns=TIMES),
        st.builds(file, st.just(b"1"), modified_at_ns=TIMES, xattrs=st.just({"user.a": b"1"})),
        st.builds(symlink, st.sampled_from(["1", "2"]), modified_at_ns=TIMES),
        st.builds(folder, modified_at_ns=TIMES),
    ),
)
STEP = st.tuples(
    st.lists(EDIT, min_size=1, max_size=4),
    st.sets(st.sampled_from(PATHS)),
    st.sampled_from(["build", "build", "build", "build", "early", "late"]),
    st.sampled_from([0, 0, 1]),
    st.booleans(),
)


def edited(tree: Tree, edits: Sequence[tuple[str, Node | None]]) -> dict[str, Node]:
    """The tree after some edits, as it can be on a disk."""
    new = {**tree, **dict(edits)}
    made: dict[str, Node] = {}
    for path in ordered(new):
        node, parent = new[path], path.rpartition("/")[0]
        if node is None or (parent and not made.get(parent, node).full_mode & MODE_DIR):
            continue
        if node.link and not node.full_mode & MODE_SYMLINK:
            target = made.get(node.link)
            if target is None or target.content is None:
                node = file(b"2", modified_at_ns=101)
            else:
                node = hardlink(node.link, mode=target.mode, modified_at_ns=target.modified_at_ns)
        made[path] = node
    return with_parents(made)


def test_the_copy_is_always_the_tree_and_nothing_unchanged_is_asked_for(times):
    number = itertools.count()

    @settings(deadline=None, max_examples=500)
    @given(st.lists(STEP, min_size=2, max_size=8))
    def check(history):
        world = World(times, f"k{next(number)}")
        last: tuple[str, int, Tree] = ("", 0, {})
        tree: Tree = {}
        for edits, cuts, what, copy, ahead in history:
            tree = edited(tree, edits)
            world.key()
            if what != "build":
                before = [dict(found.disk) for found in world.copies]
                world.give_up(tree, cuts, after_end=what == "late")
                if before != [found.disk for found in world.copies]:
                    # BuildKit has thrown away what it had: to ask for it again is not in vain.
                    last = ("", 0, {})
                continue
            asked = world.build(tree, cuts, copy, ahead=ahead)
            if last[:2] == (world.generation, copy):
                for path in asked:
                    assert not _same(path, last[2], tree), f"{path} was asked for in vain"
            last = (world.generation, copy, tree)

    check()


def _same(path: str, old: Tree, new: Tree) -> bool:
    """Whether a file is what it was in a copy, and was no part of a group of hard links."""
    if path not in old:
        return False
    one, two = old[path], new[path]
    linked = any(node.link == path for node in old.values())
    return (one.content, one.full_mode, one.link, one.xattrs) == (
        two.content,
        two.full_mode,
        two.link,
        two.xattrs,
    ) and not linked


@pytest.fixture
def world(times):
    return World(times)


def at(tree: Tree, modified_at_ns: int) -> dict[str, Node]:
    """The tree as another checkout has it."""
    return {
        path: Node(node.content, node.mode, modified_at_ns, node.link, node.xattrs)
        for path, node in tree.items()
    }


def test_a_fresh_checkout_asks_for_nothing_and_costs_no_look_at_an_entry(world):
    tree = deep(f"src/m{n // 100}/f{n}" for n in range(1000))
    assert len(world.build(tree)) == 1000
    taken = world.taken
    assert world.build(at(tree, 5)) == []
    assert world.taken == taken


def test_a_change_of_same_size_and_time_is_asked_for(world):
    tree = deep(f"f{n:03}" for n in range(200))
    world.build(tree)
    assert world.build({**tree, "f100": file(b"F100")}) == ["f100"]


def test_a_chmod_keeps_the_time(world):
    world.build({"a": file(b"1", modified_at_ns=100), "b": file(b"2")})
    changed = {"a": file(b"1", modified_at_ns=500, mode=0o755), "b": file(b"2")}
    assert world.build(changed) == ["a"]
    assert world.copies[0].disk["a"].modified_at_ns == 100


def test_moved_borders_of_pages_ask_for_nothing(world):
    tree = deep(f"f{n:03}" for n in range(90))
    world.build(tree, {"f030", "f060"})
    assert world.build(at(tree, 7), {"f010", "f040", "f041", "f080"}) == []
    assert world.build(at(tree, 8)) == []


def test_a_hard_link_follows_its_file_into_other_pages(world):
    tree = {"a": file(b"1", modified_at_ns=5), "m": file(b"x"), "z": hardlink("a")}
    world.build(tree, {"m", "z"})
    changed = {**tree, "a": file(b"2", modified_at_ns=5)}
    assert world.build(changed, {"m", "z"}) == ["a"]
    assert world.build(changed, {"m", "z"}) == []
    assert world.copies[0].disk["z"].modified_at_ns == 6


BAD_LINKS = {
    "later": {"a": hardlink("b"), "b": file(b"1")},
    "nothing": {"a": file(b"1"), "b": hardlink("c")},
    "itself": {"a": hardlink("a")},
    "a directory": {"a": folder(), "b": hardlink("a")},
    "a symbolic link": {"a": symlink("x"), "b": hardlink("a")},
    "a hard link": {"a": file(b"1"), "b": hardlink("a"), "c": hardlink("b")},
}


@pytest.mark.parametrize("cuts", [set(), {"a", "b", "c"}], ids=["one page", "many pages"])
@pytest.mark.parametrize("tree", BAD_LINKS.values(), ids=BAD_LINKS)
def test_a_hard_link_must_lead_to_a_file_before_it(world, tree, cuts):
    with pytest.raises(UsageError, match="which is no file listed before it"):
        world.tell(tree, cuts)


def test_pages_that_are_known_must_still_fit_behind_each_other(world):
    first = with_parents({"a/x": file(b"1"), "b": file(b"2")})
    world.build(first, {"a/x", "b"})
    names = dict(zip(ordered(first), encoded(first, lambda *_: True), strict=True))
    world.build(first, set(ordered(first)))
    for order in (["b", "a"], ["a/x"], ["b", "a/x"], ["a", "a"]):
        telling = Telling(world.times, world.key())
        telling.open()
        with pytest.raises(UsageError, match="the client listed"):
            telling.take([names[path].digest for path in order])


def test_an_unchanged_listing_of_fifty_thousand_files_is_cheap(world):
    tree = deep(f"services/app{n // 500:03}/module{n // 50 % 10}/f{n:05}" for n in range(50_000))
    pages = encoded(tree)
    telling = Telling(world.times, world.key())
    telling.open()
    telling.take([NewPage(page.digest, page.data, page.times) for page in pages])
    telling.finish()
    world.times.settle(world.key_in_use)
    best = 1.0
    for _ in range(3):
        began = time.process_time()
        again = Telling(world.times, world.key())
        again.open()
        told = again.take([page.digest for page in pages])
        again.finish()
        best = min(best, time.process_time() - began)
    assert sum(page.entries for page in told) == len(tree)
    assert best < 0.06
