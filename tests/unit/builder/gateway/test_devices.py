"""Which builds with devices go to which node, and what is said of those that cannot run."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from offload_builder.gateway.devices import PoolDevices, check_devices
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.platforms import PoolPlatforms
from offload_builder.gateway.scheduler import (
    NodeDevice,
    NodeView,
    QueuedBuild,
    candidates,
    waiting_reason,
)
from offload_builder.gateway.tokens import TokenRecord
from offload_core.errors import UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AMD = "linux/amd64"
GPU, NIC = "nvidia.com/gpu=0", "acme.example/nic=eth0"


def node(name: str, *devices: str, load: int = 0, slots: int = 2) -> NodeView:
    found = frozenset(NodeDevice(item) for item in devices)
    return NodeView(name, slots, load, frozenset((AMD,)), devices=found)


def build(*devices: str, only: str = "") -> QueuedBuild:
    return QueuedBuild("1", "p", 1, devices=devices, only_node=only)


def test_only_nodes_with_all_devices_get_a_build() -> None:
    nodes = [node("a"), node("b", GPU), node("c", GPU, NIC)]
    assert set(candidates(build("nvidia.com/gpu"), nodes)) == {"b", "c"}
    assert candidates(build(GPU, NIC), nodes) == ["c"]
    assert candidates(build("nvidia.com/gpu=1"), nodes) == []
    assert len(candidates(build(), nodes)) == 3


def test_any_device_is_a_wish_and_no_condition() -> None:
    assert candidates(build("*"), [node("a"), node("b", GPU)]) == ["b"]
    assert candidates(build("*"), [node("a")]) == ["a"]
    busy = [node("a"), node("b", GPU, load=2)]
    assert candidates(build("*"), busy) == []
    assert waiting_reason(build("*"), busy) == "the only node with a device is busy"


def test_reason_for_waiting_names_the_device() -> None:
    nodes = [node("a"), node("b", GPU, load=2)]
    assert waiting_reason(build(GPU), nodes) == f"the only node with {GPU} is busy"
    assert waiting_reason(build(NIC), nodes) == f"no node has {NIC}"
    assert waiting_reason(build(GPU, only="a"), nodes) == f"node a does not have {GPU}"


class Nodes:
    """A registry with the nodes that a test attaches."""

    def __init__(self) -> None:
        self.registry = NodeRegistry(5.0, 5.0)
        platforms = PoolPlatforms(self.registry, 0.0)
        platforms.begin(lambda: None)
        self.devices = PoolDevices(self.registry, platforms)

    def attach(
        self, name: str, *devices: str, alias: str = "", told: bool = True, native: str = AMD
    ) -> None:
        token = TokenRecord(name, "", name, identity_pb.ROLE_NODE, (), datetime.now(UTC))
        found = self.registry.attach(name, token, nodes_pb.Hello(slots=2, platforms=[native]))
        if told:
            heartbeat = nodes_pb.Heartbeat(
                platforms=nodes_pb.NodePlatforms(native=[native]),
                devices=nodes_pb.NodeDevices(
                    devices=[nodes_pb.NodeDevice(name=item, alias=alias) for item in devices]
                ),
            )
            self.registry.heard(found, heartbeat)

    def refusal(self, *devices: str, only: str = "", platform: str = AMD) -> str:
        problem = self.devices.refusal("p", devices, (platform,), only)
        return "" if problem is None else problem.message


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    found = Nodes()
    await asyncio.sleep(0.02)
    yield found


async def test_what_nobody_has_is_refused_with_what_there_is(nodes: Nodes) -> None:
    nodes.attach("a", alias="gpu")
    assert (
        nodes.refusal(GPU)
        == f"no node of this pool has the device {GPU}; its nodes have no devices"
    )
    nodes.attach("b", GPU, alias="gpu")
    nodes.attach("c", NIC)
    assert not nodes.refusal("gpu") and not nodes.refusal("*", GPU)
    there = f"its nodes have {NIC} and {GPU}"
    assert nodes.refusal("x/y") == f"no node of this pool has the device x/y; {there}"
    assert nodes.refusal(GPU, NIC) == f"no node of this pool has {GPU} and {NIC} together; {there}"


async def test_device_and_platform_have_to_be_at_one_node(nodes: Nodes) -> None:
    nodes.attach("a", GPU)
    nodes.attach("b", native="linux/arm64")
    assert not nodes.refusal(GPU)
    assert nodes.refusal(GPU, platform="linux/arm64") == (
        f"no node of this pool that builds linux/arm64 has the device {GPU}; node a has it for "
        "other platforms"
    )
    assert nodes.devices.is_far("p", [GPU], ["linux/arm64"])
    assert not nodes.devices.is_far("p", [GPU], [AMD])


async def test_many_devices_are_told_by_kind(nodes: Nodes) -> None:
    nodes.attach("a", *(f"nvidia.com/gpu={number}" for number in range(9)))
    assert nodes.refusal("x/y").endswith("; its nodes have nvidia.com/gpu")


async def test_nothing_is_refused_while_a_node_has_not_told_yet(nodes: Nodes) -> None:
    nodes.attach("a", told=False)
    assert not nodes.refusal(GPU)
    views = [item.view() for item in nodes.registry.connected()]
    assert "not all nodes have told yet" in nodes.devices.awaited(build(GPU), views)


async def test_client_that_is_connected_to_another_node_is_told_the_right_one(
    nodes: Nodes,
) -> None:
    nodes.attach("a")
    nodes.attach("b", GPU)
    assert not nodes.refusal(GPU, only="b")
    assert nodes.refusal(GPU, only="a") == (
        f"node a, to which you are connected, has no device {GPU}; node b has it"
    )


def test_requests_are_bounded() -> None:
    for devices in (["x"] * 51, ["x" * 257]):
        with pytest.raises(UsageError):
            check_devices(devices)
