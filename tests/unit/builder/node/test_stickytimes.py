"""The memory of sticky times: what survives, what makes a generation end, and damage."""

from __future__ import annotations

import sqlite3

import pytest

from offload_builder.node import stickytimes, toldtables
from offload_builder.node.stickytimes import StickyTimes
from offload_builder.node.telling import NewPage, Telling, told_entries
from offload_builder.node.toldtables import ListingKey
from offload_core.errors import NodeLostError
from tests.fixtures.listings import Tree, encoded, file, symlink


@pytest.fixture
def times(tmp_path):
    table = StickyTimes(tmp_path / "times.db")
    yield table
    table.close()


def tell(
    times: StickyTimes, tree: Tree, key: str = "k-1", name: str = "context", *, settle: bool = True
) -> dict[str, int]:
    """List a tree to its end; the times that BuildKit is told."""
    telling = Telling(times, ListingKey(key, name))
    telling.open()
    pages = telling.take(
        [
            NewPage(page.digest, page.data, page.times)
            if telling.needs_data(page.digest)
            else page.digest
            for page in encoded(tree)
        ]
    )
    telling.finish()
    if settle and telling.begun:
        times.settle(ListingKey(key, name))
    return {entry.path: entry.modified_at_ns for page in pages for entry in told_entries(page)}


def one(times: StickyTimes, path: str, content: bytes, mtime: int, key: str = "k-1") -> int:
    return tell(times, {path: file(content, modified_at_ns=mtime)}, key)[path]


def test_unchanged_content_keeps_its_time_whatever_the_checkout_says(times):
    assert one(times, "a", b"1", 100) == 100
    assert one(times, "a", b"1", 900) == 100
    assert one(times, "a", b"1", 5) == 100


def test_changed_content_gets_a_later_time_also_when_its_own_is_the_same(times):
    assert one(times, "a", b"1", 100) == 100
    assert one(times, "a", b"2", 100) == 101
    assert one(times, "a", b"1", 50) == 102
    assert one(times, "a", b"3", 5000) == 5000


def test_keys_and_names_do_not_know_each_other(times):
    assert one(times, "a", b"1", 100) == 100
    assert one(times, "a", b"1", 8, key="other-1") == 8
    assert tell(times, {"a": file(b"1", modified_at_ns=9)}, name="named")["a"] == 9


def test_a_mode_is_no_content_but_link_target_and_xattrs_are(times):
    assert one(times, "f", b"1", 100) == 100
    assert tell(times, {"f": file(b"1", modified_at_ns=7, mode=0o755)})["f"] == 100
    assert tell(times, {"l": symlink("x", modified_at_ns=10)})["l"] == 10
    assert tell(times, {"l": symlink("y", modified_at_ns=10)})["l"] == 11
    noted = {"l": symlink("y", modified_at_ns=10, xattrs={"user.a": b"1"})}
    assert tell(times, noted)["l"] == 12
    assert tell(times, noted)["l"] == 12


def test_a_path_that_comes_back_has_its_old_time_or_a_later_one(times):
    other = {"z": file(b"z", modified_at_ns=1)}
    assert tell(times, {"a": file(b"1", modified_at_ns=100), **other})["a"] == 100
    tell(times, other)
    tell(times, other)
    assert tell(times, {"a": file(b"1", modified_at_ns=3), **other})["a"] == 100
    tell(times, other)
    assert tell(times, {"a": file(b"2", modified_at_ns=100), **other})["a"] == 101


def test_the_memory_survives_a_restart_with_its_generation(tmp_path):
    first = StickyTimes(tmp_path / "times.db")
    assert first.known_generation("k") == ""
    generation = first.generation("k")
    assert first.known_generation("k") == generation
    key = f"k-{generation}"
    one(first, "a", b"1", 100, key)
    first.close()
    second = StickyTimes(tmp_path / "times.db")
    assert second.generation("k") == generation
    assert one(second, "a", b"1", 900, key) == 100
    second.close()


def test_what_was_told_and_not_taken_to_its_end_ends_the_generation(tmp_path):
    first = StickyTimes(tmp_path / "times.db")
    generation = first.generation("k")
    tell(first, {"a": file(b"1")}, f"k-{generation}", settle=False)
    assert first.known_generation("k") == ""
    first.close()  # As if the node had died before BuildKit had everything.
    second = StickyTimes(tmp_path / "times.db")
    renewed = second.generation("k")
    assert renewed != generation
    assert second.load(ListingKey(f"k-{generation}", "context")).pages == []
    tell(second, {"a": file(b"1")}, f"k-{renewed}")
    assert second.generation("k") == renewed
    second.close()


def test_two_listings_under_one_key_must_both_be_taken(times):
    generation = times.generation("k")
    key = f"k-{generation}"
    tell(times, {"a": file(b"1")}, key, settle=False)
    tell(times, {"a": file(b"2")}, key, settle=False)
    times.settle(ListingKey(key, "context"))
    assert times.generation("k") != generation


def test_a_retired_key_is_forgotten_and_a_late_listing_under_it_does_no_harm(times):
    generation = times.generation("k")
    one(times, "a", b"1", 100, f"k-{generation}")
    times.retire(f"k-{generation}")
    assert times.known_generation("k") == ""
    renewed = times.generation("k")
    assert renewed != generation
    one(times, "a", b"2", 100, f"k-{generation}")
    assert one(times, "a", b"3", 100, f"k-{renewed}") == 100
    times.retire(f"k-{generation}")
    assert times.generation("k") == renewed


def test_too_many_removed_paths_end_the_generation(times, monkeypatch):
    monkeypatch.setattr(toldtables, "MAX_REMOVED", 3)
    generation = times.generation("k")
    key = f"k-{generation}"
    tell(times, {f"f{number}": file(b"x") for number in range(5)}, key)
    tell(times, {"f0": file(b"x"), "f1": file(b"x")}, key)
    assert times.generation("k") == generation
    tell(times, {"g": file(b"x")}, key)
    assert times.generation("k") != generation


def test_unused_and_too_many_keys_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(toldtables, "MAX_KEYS", 3)
    now = [1_000_000_000.0]
    monkeypatch.setattr(stickytimes.time, "time", lambda: now[0])
    times = StickyTimes(tmp_path / "times.db")
    generations = {}
    for name in "abcd":
        now[0] += 10
        generations[name] = times.generation(name)
        one(times, "f", b"1", 100, f"{name}-{generations[name]}")
        if name != "d":
            assert times.generation(name) == generations[name]
    assert times.known_generation("a") == ""
    assert times.load(ListingKey(f"a-{generations['a']}", "context")).pages == []
    # Listing counts as use, also when the generation is known without the disk.
    now[0] += 20 * 86_400
    one(times, "f", b"1", 100, f"b-{generations['b']}")
    now[0] += 20 * 86_400
    times.generation("new")
    assert times.known_generation("b") == generations["b"]
    assert times.known_generation("c") == ""
    assert times.generation("b") == generations["b"]
    assert times.generation("d") != generations["d"]
    times.close()


def test_a_table_of_an_older_version_is_started_anew(tmp_path):
    old = sqlite3.connect(tmp_path / "times.db")
    old.executescript(
        "CREATE TABLE generation (shared_key TEXT PRIMARY KEY, value TEXT NOT NULL);"
        "CREATE TABLE sent (shared_key TEXT, path TEXT, content BLOB, mtime_ns INTEGER);"
        "INSERT INTO generation VALUES ('k', 'old');"
    )
    old.close()
    times = StickyTimes(tmp_path / "times.db")
    assert times.generation("k") != "old"
    assert one(times, "a", b"1", 5, f"k-{times.generation('k')}") == 5
    times.close()


def test_a_damaged_table_is_replaced_with_a_new_generation(tmp_path):
    first = StickyTimes(tmp_path / "times.db")
    generation = first.generation("k")
    first.close()
    for path in tmp_path.glob("times.db*"):
        path.write_bytes(b"no database at all" * 100)
    second = StickyTimes(tmp_path / "times.db")
    assert second.generation("k") != generation
    second.close()


def test_a_listing_with_missing_pages_ends_its_generation(tmp_path):
    times = StickyTimes(tmp_path / "times.db")
    generation = times.generation("k")
    one(times, "a", b"1", 5, f"k-{generation}")
    with sqlite3.connect(tmp_path / "times.db") as other:
        other.execute("DELETE FROM page")
    other.close()
    with pytest.raises(NodeLostError, match="damaged"):
        times.load(ListingKey(f"k-{generation}", "context"))
    assert times.generation("k") != generation
    times.close()
