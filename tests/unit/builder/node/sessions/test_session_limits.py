"""What sessions get, and what they have for themselves."""

from __future__ import annotations

import pytest

from offload_builder.node.config import NodeConfig
from offload_builder.node.sessions.contract import EngineLimits
from offload_builder.node.sessions.limits import Machine, SessionBounds, duration
from offload_builder.node.sessions.reservations import Reservations
from offload_core.errors import (
    ConfigError,
    DeviceUnavailableError,
    InvalidValueError,
    QuotaExceededError,
)
from offload_proto.v1.nodes_service_pb2 import NodeDevice, NodeDevices
from offload_proto.v1.sessions_service_pb2 import SessionSpec

GIB = 1 << 30
SMALL = EngineLimits(1000, GIB, GIB, 128)


def bounds(machine=None, free=100 * GIB, **options) -> SessionBounds:
    config = NodeConfig(gateway="g:1", **options)
    return SessionBounds(config, machine or Machine(8.0, 16 * GIB), free)


def test_a_session_that_asks_for_nothing_gets_the_defaults():
    given = bounds().give(SessionSpec())
    assert given.engine == EngineLimits(2000, 2 * GIB, 20 * GIB, 4096)
    assert (given.idle_seconds, given.grace_seconds, given.ttl_seconds) == (300.0, 600.0, 28800.0)


def test_defaults_fit_a_small_machine():
    given = bounds(Machine(1.0, 2 * GIB), free=4 * GIB).give(SessionSpec())
    assert given.engine == EngineLimits(1000, 3 * GIB // 4, 2 * GIB, 4096)


def test_a_session_gets_what_it_asks_for():
    spec = SessionSpec(cpu_millis=500, memory_bytes=GIB, disk_bytes=GIB,
                       idle_timeout=duration(60), ttl=duration(90.5))  # fmt: skip
    given = bounds().give(spec)
    assert given.engine == EngineLimits(500, GIB, GIB, 4096)
    assert (given.idle_seconds, given.ttl_seconds) == (60.0, 90.5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SessionSpec(cpu_millis=9000), "processors of a session can be at most 8"),
        (SessionSpec(memory_bytes=13 * GIB), "memory of a session can be at most 12GiB"),
        (SessionSpec(disk_bytes=51 * GIB), "disk of a session can be at most 50GiB"),
        (SessionSpec(memory_bytes=1), "memory of a session must be 256MiB or more"),
        (SessionSpec(cpu_millis=1), "processors of a session must be 0.1 or more"),
        (SessionSpec(idle_timeout=duration(7200)), "idle timeout of a session can be at most 1h0m"),
        (SessionSpec(idle_timeout=duration(0)), "idle timeout of a session must be 5"),
        (SessionSpec(ttl=duration(90_000)), "time to live of a session can be at most 24h0m"),
    ],
)
def test_more_or_less_than_any_session_has_is_refused(spec, words):
    with pytest.raises(InvalidValueError, match=words):
        bounds(session_disk_max=50 * GIB).give(spec)


@pytest.mark.parametrize(
    "options",
    [
        {"session_slots": -1},
        {"session_memory": 1},
        {"session_cpus_max": 0.01},
        {"session_cpus": 3.0, "session_cpus_max": 2.0},
        {"session_pids": 1},
        {"session_ttl": 0.0},
        {"session_idle": 7200.0},
        {"session_grace": float("inf")},
    ],
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removesuffix("_max")):
        NodeConfig(gateway="g:1", **options)


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"a b": "x"},
        {"k" * 101: "x"},
        {"k": "v" * 101},
        {"k": "\x1b[31m"},
        {str(number): "x" for number in range(101)},
    ],
)
def test_labels_that_members_could_not_name_are_refused_at_the_nodes_start(labels):
    with pytest.raises(ConfigError, match="label"):
        NodeConfig(gateway="g:1", labels=labels)


def test_labels_of_a_node_may_say_much():
    labels = {"topology.example/zone": "eu west, Köln", "gpu": "a100", "spare": ""}
    assert NodeConfig(gateway="g:1", labels=labels).labels == labels


def test_sessions_share_places_memory_and_disk():
    held = Reservations(3, 3 * GIB)
    held.take("a", SMALL, (), free_disk=GIB)
    with pytest.raises(QuotaExceededError, match=r"2GiB of memory left, and this one needs 4GiB"):
        held.take("b", EngineLimits(1, 4 * GIB, 1, 1), (), free_disk=GIB)
    with pytest.raises(QuotaExceededError, match=r"0B of disk left, and this one needs 1GiB"):
        held.take("b", SMALL, (), free_disk=0)
    held.take("b", SMALL, (), free_disk=GIB)
    held.take("c", SMALL, (), free_disk=GIB)
    with pytest.raises(QuotaExceededError, match="all 3 sessions"):
        held.take("d", SMALL, (), free_disk=GIB)
    held.give_back("a")
    held.take("d", SMALL, (), free_disk=GIB)


def devices(*names: str) -> NodeDevices:
    return NodeDevices(devices=[NodeDevice(name=name) for name in names])


GPUS = devices("nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=all", "acme.com/fpga=x")


def test_a_gpu_is_given_to_one_session_only():
    held = Reservations(9, 9 * GIB)
    assert held.choose((), gpu=True, found=GPUS) == ("nvidia.com/gpu=0",)
    held.take("a", SMALL, ("nvidia.com/gpu=0",), free_disk=GIB)
    assert held.choose((), gpu=True, found=GPUS) == ("nvidia.com/gpu=1",)
    with pytest.raises(QuotaExceededError, match=r"other sessions have nvidia\.com/gpu=0"):
        held.choose(["nvidia.com/gpu=0"], gpu=False, found=GPUS)
    with pytest.raises(QuotaExceededError):
        held.choose(["nvidia.com/gpu=all"], gpu=False, found=GPUS)
    held.take("b", SMALL, ("nvidia.com/gpu=1",), free_disk=GIB)
    with pytest.raises(QuotaExceededError, match="other sessions have a GPU"):
        held.choose((), gpu=True, found=GPUS)
    assert held.devices() == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]


def test_devices_are_found_by_name_and_kind():
    held = Reservations(9, 9 * GIB)
    assert held.choose(["acme.com/fpga"], gpu=False, found=GPUS) == ("acme.com/fpga=x",)
    chosen = held.choose(["nvidia.com/gpu=all"], gpu=True, found=GPUS)
    assert chosen == ("nvidia.com/gpu=all",)
    with pytest.raises(DeviceUnavailableError, match=r"no device acme\.com/other"):
        held.choose(["acme.com/other=1"], gpu=False, found=GPUS)
    with pytest.raises(DeviceUnavailableError, match="no GPU"):
        held.choose((), gpu=True, found=None)


def test_two_names_that_may_be_one_device_are_not_given_to_two_sessions():
    held = Reservations(9, 9 * GIB)
    held.take("a", SMALL, ("nvidia.com/gpu=GPU-12ab",), free_disk=GIB)
    with pytest.raises(QuotaExceededError):
        held.choose(["nvidia.com/gpu=0"], gpu=False, found=GPUS)
