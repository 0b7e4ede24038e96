"""Names of devices: what is asked for, and what a name means."""

from __future__ import annotations

import pytest

from offload_core.devices import ANY_DEVICE, DeviceWish, means, read_wish, wanted_devices
from offload_core.errors import InvalidValueError

GPU = "nvidia.com/gpu=all"


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("device", DeviceWish(ANY_DEVICE)),
        ("device=", DeviceWish(ANY_DEVICE)),
        (f"device={GPU}", DeviceWish(GPU)),
        ("device=nvidia.com/gpu=*", DeviceWish("nvidia.com/gpu=*")),
        ("device=nvidia.com/gpu", DeviceWish("nvidia.com/gpu")),
        ("device=gpu", DeviceWish("gpu")),
        (f'device="{GPU}",alias=acme.example/x', DeviceWish(GPU, "acme.example/x")),
    ],
)
def test_entitlement_is_read_as_buildkit_does(text: str, wish: DeviceWish) -> None:
    assert read_wish(text) == wish
    assert read_wish(wish.entitlement) == wish


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "a b",
        "a=b=c",
        "a/b/c=d",
        '"a',
        "a,b",
        "a,alias=b c",
        "a,x=y",
        "é",
        "=a",
        "a" * 300,
    ],
)
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError):
        read_wish(f"device={text}")


def test_other_entitlements_want_no_device() -> None:
    wanted = ["network.host", f"device={GPU}", "device", f"device={GPU},alias=x"]
    assert wanted_devices(wanted) == [GPU, ANY_DEVICE]


@pytest.mark.parametrize(
    ("wanted", "device", "found"),
    [
        (GPU, GPU, True),
        (GPU, "nvidia.com/gpu=0", False),
        ("nvidia.com/gpu", GPU, True),
        ("nvidia.com/gpu=*", "nvidia.com/gpu=0", True),
        ("nvidia.com/gpu=*", "nvidia.com/gpus=0", False),
        ("nvidia.com", GPU, False),
        ("fast", GPU, True),
        ("slow", GPU, False),
        (ANY_DEVICE, GPU, True),
    ],
)
def test_a_name_means_what_it_means_to_buildkit(wanted: str, device: str, found: bool) -> None:
    assert means(wanted, device, "fast") is found


def test_device_without_a_further_name_has_none() -> None:
    assert not means("", GPU)
