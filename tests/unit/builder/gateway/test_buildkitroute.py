"""Which node gets a connection of a BuildKit client, and what it waits for there."""

from __future__ import annotations

from offload_builder.gateway.buildkitroute import choose_node
from offload_builder.gateway.scheduler import (
    NodeView,
    QueuedBuild,
    plan,
    rank_nodes,
    waiting_reason,
)

AMD64 = frozenset({"linux/amd64"})


def node(node_id, *, slots=2, load=0, draining=False, projects=()):
    return NodeView(node_id, slots, load, AMD64, draining=draining, project_ids=frozenset(projects))


def order(project, *names):
    return rank_nodes(project, frozenset(names))


def test_the_projects_own_node_comes_first_while_it_has_a_slot():
    first, second = order("shop", "a", "b")
    assert choose_node("shop", [node("a"), node("b")]) == first
    busy = [node(first, load=2), node(second)]
    assert choose_node("shop", busy) == second


def test_when_all_are_full_the_least_loaded_one_queues():
    nodes = [node("a", slots=2, load=8), node("b", slots=4, load=4), node("c", slots=1, load=3)]
    assert choose_node("shop", nodes) == "b"


def test_builds_that_wait_for_a_node_count_as_its_load():
    first, second = order("shop", "a", "b")
    full = [node("a", slots=1, load=1), node("b", slots=1, load=1)]
    assert choose_node("shop", full) == first
    assert choose_node("shop", full, {first: 1}) == second
    assert choose_node("shop", full, {first: 1, second: 1}) == first
    # Its free slot is as good as taken by the one who waits.
    freed = [node(first, slots=1), node(second, slots=1, load=1)]
    assert choose_node("shop", freed) == first
    assert choose_node("shop", freed, {first: 1}) == first
    assert choose_node("shop", freed, {first: 2}) == second
    assert choose_node("shop", [node("a"), node("b")], {first: 2}) == second


def test_draining_and_foreign_nodes_get_no_connection():
    assert choose_node("shop", [node("a", draining=True)]) == ""
    assert choose_node("shop", [node("a", projects=["other"]), node("b", load=9)]) == "b"
    assert choose_node("shop", []) == ""
    assert choose_node("shop", [node("a", slots=0)]) == "a"


def test_a_build_with_a_connection_is_planned_for_its_node_only():
    build = QueuedBuild("x", "shop", 1, only_node="b")
    nodes = [node("a"), node("b", load=2)]
    assert plan([build], nodes) == {}
    assert waiting_reason(build, nodes) == (
        "node b is busy; node a is free now: start the command again to build there"
    )
    assert waiting_reason(build, [node("a", load=2), nodes[1]]) == "node b is busy"
    assert plan([build], [node("a"), node("b")]) == {"x": "b"}


def test_the_reason_names_the_node_of_the_connection():
    build = QueuedBuild("x", "shop", 1, ("linux/arm64",), only_node="b")
    assert "is away" in waiting_reason(build, [node("a")])
    assert waiting_reason(build, [node("b")]) == "node b does not build linux/arm64"
    plain = QueuedBuild("x", "shop", 1, only_node="b")
    assert waiting_reason(plain, [node("b", draining=True)]) == "node b is draining"
    assert "does not serve" in waiting_reason(plain, [node("b", projects=["other"])])
    declined = QueuedBuild("x", "shop", 1, declined_by=frozenset({"b"}), only_node="b")
    assert "declined" in waiting_reason(declined, [node("b")])
