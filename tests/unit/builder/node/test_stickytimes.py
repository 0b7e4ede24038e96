"""The rules of sticky times, and what a damaged or full table does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.stickytimes import StickyTimes
from offload_proto.v1.node_service_pb2 import ContextEntry


@pytest.fixture
def times(tmp_path):
    table = StickyTimes(tmp_path / "times.db")
    yield table
    table.close()


def told(times: StickyTimes, path: str, content: bytes, mtime: int, key: str = "k", **rest) -> int:
    entry = ContextEntry(path=path, sha256=content, modified_at_unix_ns=mtime, **rest)
    times.apply(key, [entry])
    return entry.modified_at_unix_ns


def test_unchanged_content_keeps_its_time_whatever_the_checkout_says(times):
    assert told(times, "a", b"1", 100) == 100
    assert told(times, "a", b"1", 900) == 100
    assert told(times, "a", b"1", 5) == 100


def test_changed_content_gets_a_later_time_also_when_its_own_is_the_same(times):
    assert told(times, "a", b"1", 100) == 100
    assert told(times, "a", b"2", 100) == 101
    assert told(times, "a", b"1", 50) == 102
    assert told(times, "a", b"3", 5000) == 5000


def test_keys_and_paths_do_not_know_each_other(times):
    assert told(times, "a", b"1", 100) == 100
    assert told(times, "b", b"1", 7) == 7
    assert told(times, "a", b"1", 8, key="other") == 8


def test_link_target_and_xattrs_are_content(times):
    assert told(times, "l", b"", 10, link_name="x") == 10
    assert told(times, "l", b"", 10, link_name="y") == 11
    assert told(times, "l", b"", 10, link_name="y", xattrs={"user.a": b"1"}) == 12
    assert told(times, "l", b"", 10, link_name="y", xattrs={"user.a": b"1"}) == 12


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([b"1", b"2", b"3"]),
                          st.integers(0, 50)), max_size=30))  # fmt: skip
def test_time_changes_exactly_when_content_does_and_only_grows(tmp_path_factory, history):
    times = StickyTimes(tmp_path_factory.mktemp("t") / "times.db")
    last: dict[str, tuple[bytes, int]] = {}
    for path, content, mtime in history:
        now = told(times, path, content, mtime)
        if path in last:
            assert (now == last[path][1]) == (content == last[path][0])
            assert now >= last[path][1]
        last[path] = (content, now)
    times.close()


def test_table_survives_a_restart_with_its_generation(tmp_path):
    first = StickyTimes(tmp_path / "times.db")
    assert first.known_generation("k") == ""
    generation = first.generation("k")
    assert first.known_generation("k") == generation
    told(first, "a", b"1", 100)
    first.close()
    second = StickyTimes(tmp_path / "times.db")
    assert second.generation("k") == generation
    assert told(second, "a", b"1", 900) == 100
    second.close()


def test_damaged_table_is_replaced_with_a_new_generation(tmp_path):
    first = StickyTimes(tmp_path / "times.db")
    generation = first.generation("k")
    first.close()
    for path in tmp_path.glob("times.db*"):
        path.write_bytes(b"no database at all" * 100)
    second = StickyTimes(tmp_path / "times.db")
    assert second.generation("k") != generation
    second.close()
