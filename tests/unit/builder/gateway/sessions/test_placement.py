"""Which node takes which session, and what is said of those that wait or cannot be."""

from __future__ import annotations

from typing import Any

from offload_builder.gateway.scheduler import NodeDevice, rank_nodes
from offload_builder.gateway.sessions.placement import (
    SessionNode,
    SessionWish,
    candidates,
    overlap,
    refusal,
    waiting_reason,
)
from offload_core.errors import DeviceUnavailableError, NotFoundError

GPUS = tuple(f"nvidia.com/gpu={name}" for name in ("0", "1", "GPU-f00", "all"))


def node(name: str, *devices: str, slots: int = 2, **values: Any) -> SessionNode:
    found = frozenset(NodeDevice(item) for item in devices)
    return SessionNode(name, slots, devices=found, **values)


def wish(**values: Any) -> SessionWish:
    return SessionWish("shop", **values)


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


def test_fewest_sessions_come_first_and_then_the_projects_own_order() -> None:
    nodes = [node("a", load=1), node("b"), node("c"), node("d")]
    found = candidates(wish(), nodes)
    assert found[-1] == "a"
    order = rank_nodes("shop", frozenset("bcd"))
    assert found[:3] == list(order)
    other = candidates(SessionWish("other-project"), nodes)
    assert sorted(other[:3]) == ["b", "c", "d"]


def test_nodes_that_cannot_take_a_session_now_are_left_out() -> None:
    nodes = [
        node("drains", draining=True),
        node("troubled", problem="its disk is full"),
        node("full", load=2),
        node("none", slots=0),
        node("other", project_ids=frozenset(("other",))),
        node("failed"),
        node("good"),
    ]
    assert candidates(wish(avoid=frozenset(("failed",))), nodes) == ["good"]


def test_labels_and_sizes_have_to_fit() -> None:
    nodes = [
        node("a", labels=labels(zone="a", disk="fast"), memory_bytes=8 << 30),
        node("b", labels=labels(zone="b")),
    ]
    assert candidates(wish(labels=labels(zone="a")), nodes) == ["a"]
    assert candidates(wish(labels=labels(zone="b", disk="fast")), nodes) == []
    # A node that does not say how much it gives is asked.
    assert candidates(wish(memory_bytes=9 << 30), nodes) == ["b"]


def test_gpu_of_a_session_is_no_other_ones() -> None:
    free = node("n", *GPUS)
    assert free.pick(wish(gpu=True)) == (GPUS[0],)
    assert node("n", *GPUS, taken=frozenset(GPUS[:1])).pick(wish(gpu=True)) == (GPUS[1],)
    # All of them are free only when each is.
    everything = wish(devices=(GPUS[3],))
    assert free.pick(everything) == (GPUS[3],)
    assert node("n", *GPUS, taken=frozenset(GPUS[:1])).pick(everything) is None
    assert node("n", *GPUS, taken=frozenset(GPUS[3:])).pick(wish(gpu=True)) is None
    # A device that was asked for by name is the GPU, and counts once.
    assert free.pick(wish(devices=(GPUS[1],), gpu=True)) == (GPUS[1],)
    assert free.pick(wish(devices=(GPUS[1], GPUS[1]))) is None
    assert node("n", "acme.example/nic=0").pick(wish(gpu=True)) is None


def test_devices_overlap_within_their_kind_only() -> None:
    assert overlap(GPUS[0], GPUS[3])
    assert not overlap(GPUS[0], GPUS[1])
    assert not overlap("amd.com/gpu=all", GPUS[0])


def sentence(wanted: SessionWish, *nodes: SessionNode) -> tuple[type, str]:
    error = refusal(wanted, nodes)
    assert error is not None
    return type(error), error.message


def test_refusal_names_what_there_is() -> None:
    one = node("a", "x.example/y=1", labels=labels(zone="a"), memory_bytes=8 << 30)
    two = node("b", "x.example/y=2", memory_bytes=4 << 30, cpu_millis=2000, disk_bytes=10**10)
    kind, text = sentence(wish(labels=labels(zone="c")), one, two)
    assert (kind, text) == (
        NotFoundError,
        "no node that takes sessions has the label zone=c; they have zone=a",
    )
    kind, text = sentence(wish(gpu=True), one, two)
    assert (kind, text) == (
        DeviceUnavailableError,
        "no node that takes sessions has a GPU; they have x.example/y=1 and x.example/y=2",
    )
    _, text = sentence(wish(memory_bytes=9 << 30), one, two)
    assert text == "no node gives a session 9GiB of memory; the most that one gives is 8GiB"
    _, text = sentence(wish(cpu_millis=2500, disk_bytes=10**12), two)
    assert text == "no node gives a session 2.5 processors; the most that one gives is 2"
    _, text = sentence(wish(disk_bytes=10**12), two)
    assert text == "no node gives a session 1TB of disk; the most that one gives is 10GB"
    _, text = sentence(wish(devices=("x.example/y=2",), labels=labels(zone="a")), one, two)
    assert "together" in text
    _, text = sentence(wish(), node("a", slots=0, problem="it has no firewall"))
    assert text == "no node of this pool takes sessions: node a: it has no firewall"


def test_what_some_node_can_do_is_never_refused() -> None:
    busy = node("a", GPUS[0], load=2, draining=True, problem="full", taken=frozenset(GPUS[:1]))
    assert refusal(wish(gpu=True), [busy]) is None
    assert refusal(wish(), []) is None
    assert refusal(wish(), [node("a", project_ids=frozenset(("other",)))]) is None


def test_reason_for_waiting_is_one_sentence() -> None:
    cases = [
        ([], wish(), "no node is attached"),
        ([node("a", project_ids=frozenset(("o",)))], wish(), 'no node serves the project "shop"'),
        ([node("a", draining=True)], wish(), "the only node that can take it, a, is draining"),
        (
            [node("a", load=2), node("b", load=3)],
            wish(),
            "all 2 nodes that can take it are full of sessions",
        ),
        (
            [node("a", problem="its disk is full")],
            wish(),
            "node a takes no sessions now: its disk is full",
        ),
        (
            [node("a", *GPUS, taken=frozenset(GPUS[3:]))],
            wish(gpu=True),
            "other sessions have its GPU",
        ),
        (
            [node("a")],
            wish(labels=labels(zone="b")),
            (
                "no node that takes sessions has the label zone=b; they have no labels, but one "
                "may still come"
            ),
        ),
        (
            [node("a")],
            wish(avoid=frozenset("a")),
            "the free nodes could not take it; they are asked again",
        ),
        ([node("a")], wish(), "other sessions are before it"),
    ]
    for nodes, wanted, expected in cases:
        assert waiting_reason(wanted, nodes) == expected
