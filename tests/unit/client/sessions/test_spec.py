"""What a command line wants of a session."""

from __future__ import annotations

import pytest

from offload_client.sessions.spec import make_spec
from offload_core.errors import UsageError


def test_every_wish_reaches_the_specification() -> None:
    spec = make_spec(
        "training",
        {
            "gpu": True,
            "devices": ("nvidia.com/gpu=0",),
            "cpus": 1.5,
            "memory": "4g",
            "disk_size": "20GiB",
            "idle_timeout": 600.0,
            "ttl": 3600.0,
            "node_labels": ("zone=eu", "kind="),
        },
    )
    assert spec.name == "training"
    assert spec.gpu
    assert list(spec.devices) == ["nvidia.com/gpu=0"]
    assert (spec.cpu_millis, spec.memory_bytes, spec.disk_bytes) == (1500, 4 << 30, 20 << 30)
    assert (spec.idle_timeout.seconds, spec.ttl.seconds) == (600, 3600)
    assert dict(spec.node_labels) == {"zone": "eu", "kind": ""}


def test_what_is_not_asked_for_is_left_to_the_node() -> None:
    assert [field.name for field, _ in make_spec("default", {}).ListFields()] == ["name"]


@pytest.mark.parametrize(
    "wish",
    [
        {"devices": ("gpu",)}, {"devices": ("nvidia.com/gpu",)}, {"cpus": 0.0}, {"cpus": 1e9},
        {"memory": "lots"}, {"disk_size": "-1"}, {"ttl": 0.5}, {"node_labels": ("zone",)},
        {"node_labels": ("=eu",)},
    ],
)  # fmt: skip
def test_value_that_cannot_be_used_is_refused(wish: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_spec("default", wish)
