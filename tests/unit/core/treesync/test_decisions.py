from __future__ import annotations

from offload_core.treesync.decisions import Plan, decide
from offload_core.treesync.entries import ABSENT, Entry, Listing, directory
from offload_proto.v1.session_sync_service_pb2 import SYNC_KIND_FILE

OLD, NEW, OTHER_NEW = (
    Entry(SYNC_KIND_FILE, 0o644, 1, 1, bytes([number]) * 32) for number in range(3)
)
FOLDER = directory(0o755)


def plan(base: Listing, here: Listing, there: Listing, *, two_way: bool = True) -> Plan:
    return decide({*base, *here, *there}, base, here, there, two_way=two_way)


def test_side_that_has_not_changed_takes_the_other() -> None:
    found = plan({"f": OLD}, {"f": NEW}, {"f": OLD})
    assert [(item.path, item.wanted, item.expected) for item in found.there] == [("f", NEW, OLD)]
    found = plan({"f": OLD}, {"f": OLD}, {"f": NEW})
    assert [(item.path, item.wanted, item.expected) for item in found.here] == [("f", NEW, OLD)]


def test_deletion_reaches_only_what_has_not_changed() -> None:
    assert [item.wanted for item in plan({"f": OLD}, {}, {"f": OLD}).there] == [ABSENT]
    assert [item.wanted for item in plan({"f": OLD}, {}, {"f": NEW}).here] == [NEW]
    assert [item.wanted for item in plan({"f": OLD}, {"f": NEW}, {}).there] == [NEW]


def test_version_of_the_session_is_set_aside() -> None:
    found = plan({"f": OLD}, {"f": NEW}, {"f": OTHER_NEW})
    assert found.conflicts == ["f"]
    assert found.here == []
    assert found.there[0].aside.startswith("f.conflict-")


def test_directory_with_something_new_is_not_deleted() -> None:
    base: Listing = {"d": FOLDER, "d/f": OLD}
    found = plan(base, {}, {**base, "d/new": NEW})
    assert [item.path for item in found.here] == ["d", "d/new"]
    assert [(item.path, item.wanted) for item in found.there] == [("d/f", ABSENT)]


def test_directory_that_became_a_file_here_is_set_aside_with_what_is_new_in_it() -> None:
    base: Listing = {"d": FOLDER, "d/f": OLD}
    found = plan(base, {"d": NEW}, {"d": FOLDER, "d/f": OTHER_NEW})
    assert found.here == []
    assert [item.path for item in found.there] == ["d"]
    assert found.there[0].aside
    assert found.later == ["d/f"]


def test_children_go_before_their_parents_and_come_after_them() -> None:
    base: Listing = {"a": FOLDER, "a/b": FOLDER, "a/b/c": OLD}
    assert [item.path for item in plan(base, {}, base).there] == ["a/b/c", "a/b", "a"]
    assert [item.path for item in plan({}, base, {}).there] == ["a", "a/b", "a/b/c"]


def test_one_way_undoes_what_the_session_does() -> None:
    found = plan({"f": OLD}, {"f": OLD}, {"f": NEW, "g": NEW}, two_way=False)
    assert found.here == []
    assert {(item.path, item.wanted) for item in found.there} == {("f", OLD), ("g", ABSENT)}
