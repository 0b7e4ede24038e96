"""Invariants of the scheduler."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.gateway.scheduler import (
    NodeView,
    QueuedBuild,
    candidates,
    fair_order,
    normalise_platform,
    plan,
    rank_nodes,
    waiting_reason,
)

PLATFORMS = ("linux/amd64", "linux/arm64", "linux/s390x")
PROJECTS = ("shop", "site", "tools")


def node(node_id: str, **values: object) -> NodeView:
    defaults = {"slots": 2, "load": 0, "platforms": frozenset({"linux/amd64"})}
    return NodeView(node_id=node_id, **defaults | values)  # type: ignore[arg-type]


nodes_lists = st.lists(
    st.builds(
        NodeView,
        node_id=st.sampled_from([f"node-{number}" for number in range(8)]),
        slots=st.integers(0, 5),
        load=st.integers(0, 6),
        platforms=st.frozensets(st.sampled_from(PLATFORMS), min_size=1),
        draining=st.booleans(),
        project_ids=st.frozensets(st.sampled_from(PROJECTS), max_size=2),
    ),
    max_size=8,
    unique_by=lambda view: view.node_id,
)
queues = st.lists(
    st.tuples(
        st.sampled_from(PROJECTS),
        st.lists(st.sampled_from(PLATFORMS), max_size=2, unique=True),
        st.frozensets(st.sampled_from(["node-0", "node-1"]), max_size=2),
    ),
    max_size=30,
).map(
    lambda items: [
        QueuedBuild(f"b{number}", project, number, tuple(platforms), declined)
        for number, (project, platforms, declined) in enumerate(items)
    ]
)
served = st.dictionaries(st.sampled_from(PROJECTS), st.integers(0, 9))


@given(queues, nodes_lists, st.floats(1.25, 2))
def test_plan_never_exceeds_slots_and_only_uses_nodes_that_suit(queue, nodes, factor):
    placed = plan(queue, nodes, factor)
    views = {view.node_id: view for view in nodes}
    builds = {build.build_id: build for build in queue}
    for node_id, count in Counter(placed.values()).items():
        assert views[node_id].load + count <= views[node_id].slots
    for build_id, node_id in placed.items():
        assert views[node_id].suits(builds[build_id])
        assert not views[node_id].draining
        assert node_id not in builds[build_id].declined_by


@given(queues, nodes_lists)
def test_plan_leaves_no_build_waiting_beside_a_free_node_that_suits(queue, nodes):
    placed = plan(queue, nodes)
    taken = Counter(placed.values())
    for build in queue:
        if build.build_id not in placed:
            for view in nodes:
                free = not view.draining and view.load + taken[view.node_id] < view.slots
                assert not (free and view.suits(build) and view.node_id not in build.declined_by)


@given(queues, served)
def test_fair_order_keeps_every_build_and_the_order_within_a_project(queue, turns):
    order = fair_order(queue, turns)
    assert sorted(build.build_id for build in order) == sorted(build.build_id for build in queue)
    for project in PROJECTS:
        arrivals = [build.arrival for build in order if build.project_id == project]
        assert arrivals == sorted(arrivals)


@given(queues, served)
def test_fair_order_gives_each_project_one_build_per_round(queue, turns):
    order = fair_order(queue, turns)
    left = Counter(build.project_id for build in queue)
    seen: Counter[str] = Counter()
    for build in order:
        for other in PROJECTS:
            if seen[other] < left[other]:
                assert seen[build.project_id] <= seen[other]
        seen[build.project_id] += 1


def test_project_served_longest_ago_comes_first():
    queue = [QueuedBuild("a", "shop", 1), QueuedBuild("b", "site", 2), QueuedBuild("c", "tools", 3)]
    order = fair_order(queue, {"shop": 5, "site": 4})
    assert [build.project_id for build in order] == ["tools", "site", "shop"]


@given(st.frozensets(st.text("abc", min_size=1, max_size=4), min_size=1), st.data())
def test_ranking_of_the_others_survives_the_loss_of_a_node(node_ids, data):
    lost = data.draw(st.sampled_from(sorted(node_ids)))
    before = [node_id for node_id in rank_nodes("shop", node_ids) if node_id != lost]
    assert list(rank_nodes("shop", node_ids - {lost})) == before


def test_projects_are_spread_over_nodes():
    nodes = frozenset(f"node-{number}" for number in range(4))
    first = Counter(rank_nodes(f"project-{number}", nodes)[0] for number in range(400))
    assert min(first.values()) > 60


@given(nodes_lists, st.floats(1.25, 2))
def test_candidates_within_the_bound_come_before_those_above(nodes, factor):
    build = QueuedBuild("b", "shop", 1)
    usable = [view for view in nodes if not view.draining and view.suits(build)]
    slots, load = sum(v.slots for v in usable), sum(v.load for v in usable)
    views = {view.node_id: view for view in nodes}
    above = [
        views[node_id].load >= factor * (load + 1) * views[node_id].slots / slots
        for node_id in candidates(build, nodes, factor)
    ]
    assert above == sorted(above)


def test_project_stays_on_its_first_node_until_the_bound():
    nodes = [node("node-a", slots=4), node("node-b", slots=4)]
    first = rank_nodes("shop", frozenset({"node-a", "node-b"}))[0]
    queue = [QueuedBuild(f"b{number}", "shop", number) for number in range(4)]
    placed = list(plan(queue, nodes, 1.5).values())
    assert placed[:2] == [first, first]
    assert len(set(placed)) == 2


@pytest.mark.parametrize(
    ("nodes", "platforms", "reason"),
    [
        ([], (), "no node is attached"),
        ([node("a")], ("linux/arm64",), "no node builds linux/arm64"),
        (
            [node("a"), node("b", platforms=frozenset({"linux/arm64"}))],
            ("linux/amd64", "linux/arm64"),
            "no node builds linux/amd64 and linux/arm64 together",
        ),
        ([node("a", load=2), node("b", load=2)], (), "all 2 nodes are busy"),
        ([node("a", load=2)], ("linux/amd64",), "the only node is busy"),
        ([node("a", draining=True)], (), "the only node is draining"),
        (
            [node("a", load=2), node("b", platforms=frozenset({"linux/arm64"}))],
            ("linux/amd64",),
            "the only node that builds linux/amd64 is busy",
        ),
        ([node("a", project_ids=frozenset({"x"}))], (), 'no node serves the project "shop"'),
    ],
)
def test_reason_says_why_a_build_waits(nodes, platforms, reason):
    assert waiting_reason(QueuedBuild("b", "shop", 1, platforms), nodes) == reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("linux/arm64/v8", "linux/arm64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("linux/aarch64", "linux/arm64"),
    ],
)
def test_platforms_are_compared_in_normal_form(given, expected):
    assert normalise_platform(given) == expected


def test_node_with_which_a_build_was_lost_is_asked_last() -> None:
    nodes = [node("one"), node("two"), node("three")]
    first, *others = candidates(QueuedBuild("b", "shop", 1), nodes)
    again = QueuedBuild("b", "shop", 1, last_choice=first)
    assert candidates(again, nodes) == [*others, first]
    assert candidates(again, [node(first)]) == [first]


def test_images_are_built_where_their_member_has_a_session() -> None:
    nodes = [node("one"), node("two"), node("three")]
    order = candidates(QueuedBuild("b", "shop", 1), nodes)
    near = QueuedBuild("b", "shop", 1, session_node=order[2])
    assert candidates(near, nodes) == [order[2], *order[:2]]
    # Not where too much runs already, and not again where the build was lost.
    busy = [node(name, slots=4, load=3 if name == order[2] else 0) for name in order]
    assert candidates(near, busy)[-1] == order[2]
    lost = QueuedBuild("b", "shop", 1, session_node=order[2], last_choice=order[2])
    assert candidates(lost, nodes)[-1] == order[2]
    gone = QueuedBuild("b", "shop", 1, session_node="gone")
    assert candidates(gone, nodes) == order


def test_a_build_with_a_network_policy_goes_where_there_is_a_firewall() -> None:
    build = QueuedBuild("b", "shop", 1, behind_firewall=True)
    nodes = [node("plain"), node("walled", firewall=True)]
    assert candidates(build, nodes) == ["walled"]
    assert candidates(build, nodes[:1]) == []
    reason = "no node enforces network policies of builds"
    assert waiting_reason(build, nodes[:1]) == reason
    assert waiting_reason(build, [node("walled", firewall=True, load=2)]) == (
        "the only node is busy"
    )
