"""What the frontend is told of a step's memory and processors."""

from __future__ import annotations

import pytest

from offload_builder.node.steplimits import StepBounds, resource_attributes
from offload_core.errors import ConfigError, UsageError
from offload_proto.v1.build_spec_pb2 import ResourceLimits

MIB = 1 << 20


def test_nothing_is_said_where_nobody_set_a_bound():
    assert resource_attributes(ResourceLimits(), StepBounds()) == {}


def test_wishes_have_the_names_of_the_frontend():
    wishes = ResourceLimits(
        memory_bytes=64 * MIB, memory_swap_bytes=-1, cpu_shares=512, cpu_quota=50_000,
        cpu_period=200_000, cpuset_cpus="0-3,8", cpuset_mems="0",
    )  # fmt: skip
    assert resource_attributes(wishes, StepBounds()) == {
        "memory": str(64 * MIB), "memswap": "-1", "cpushares": "512", "cpuquota": "50000",
        "cpuperiod": "200000", "cpusetcpus": "0-3,8", "cpusetmems": "0",
    }  # fmt: skip


def test_bounds_of_the_node_hold_for_builds_that_ask_for_nothing():
    only_most = StepBounds(max_memory_bytes=96 * MIB, max_cpus=1.5)
    assert resource_attributes(ResourceLimits(), only_most) == {
        "memory": str(96 * MIB), "cpuquota": "150000", "cpuperiod": "100000",
    }  # fmt: skip
    both = StepBounds(48 * MIB, 96 * MIB, 0.5, 1.5)
    assert resource_attributes(ResourceLimits(), both) == {
        "memory": str(48 * MIB), "cpuquota": "50000", "cpuperiod": "100000",
    }  # fmt: skip
    slow = resource_attributes(ResourceLimits(cpu_period=10_000), both)
    assert (slow["cpuquota"], slow["cpuperiod"]) == ("5000", "10000")


@pytest.mark.parametrize(
    "wishes",
    [
        {"memory_bytes": 97 * MIB},
        {"memory_bytes": 90 * MIB, "memory_swap_bytes": -1},
        {"memory_bytes": 90 * MIB, "memory_swap_bytes": 193 * MIB},
        {"memory_bytes": 90 * MIB, "memory_swap_bytes": 80 * MIB},
        {"memory_bytes": 1 * MIB},
        {"memory_bytes": -1},
        {"cpu_quota": 160_000},
        {"cpu_quota": 16_000, "cpu_period": 10_000},
        {"cpuset_cpus": "0;1"},
        {"cpuset_mems": "all"},
    ],
)
def test_wishes_above_the_bounds_of_the_node_and_nonsense_are_refused(wishes):
    with pytest.raises(UsageError, match="--resource"):
        resource_attributes(ResourceLimits(**wishes), StepBounds(0, 96 * MIB, 0, 1.5))


@pytest.mark.parametrize(
    "bounds",
    [
        StepBounds(100 * MIB, 96 * MIB),
        StepBounds(0, 1 * MIB),
        StepBounds(0, 0, 2.0, 1.5),
        StepBounds(0, 0, 0.001),
        StepBounds(0, 0, float("inf")),
        StepBounds(0, 0, 0, float("nan")),
    ],
)
def test_bounds_that_do_not_go_together_are_refused(bounds):
    with pytest.raises(ConfigError):
        bounds.check()
