"""What containers of sessions may be made with."""

from __future__ import annotations

import json

import pytest

from offload_builder.node.sessions.guard.creation import read_creation
from offload_core.errors import DeviceUnavailableError, UsageError

GPUS = ("nvidia.com/gpu=0", "nvidia.com/gpu=1", "acme.com/fpga=a")


def wish(**host) -> bytes:
    return json.dumps({"Image": "busybox", "HostConfig": host}).encode()


def devices(body: bytes) -> list[dict[str, object]]:
    return json.loads(read_creation(body, GPUS).body)["HostConfig"]["DeviceRequests"]


def request(**values) -> dict[str, object]:
    """What the CLI sends for --gpus."""
    usual = {"Driver": "", "Count": 0, "DeviceIDs": None, "Options": {}}
    return usual | {"Capabilities": [["gpu"]]} | values


@pytest.mark.parametrize("source", ["/", "/etc", "/offload/binds/../x", "/offload/bindsx", "~/x"])
def test_directories_of_the_engines_machine_are_refused_with_a_way_out(source):
    for host in (
        {"Binds": [f"{source}:/x"]},
        {"Mounts": [{"Type": "bind", "Source": source, "Target": "/x"}]},
    ):
        with pytest.raises(UsageError, match="no directory") as caught:
            read_creation(wish(**host), ())
        assert "docker cp" in caught.value.hint


@pytest.mark.parametrize("source", ["/offload/binds/1/src", "/var/run/docker.sock", "named"])
def test_brought_directories_named_volumes_and_the_own_socket_pass_unchanged(source):
    body = wish(Binds=[f"{source}:/x:ro"], Mounts=[{"Type": "tmpfs", "Target": "/y"}])
    assert read_creation(body, ()).body is body


@pytest.mark.parametrize(
    "text",
    [
        '{"hostconfig": {"binds": ["/etc:/x"]}}',
        '{"Ho\u017ftConfig": {"Binds": ["/etc:/x"]}}',
        '{"HostConfig": {"MOUNTS": [{"type": "bind", "SOURCE": "/etc"}]}}',
        '{"HostConfig": {"Binds": ["/etc:/x"]}, "HostConfig": {}}',
        '{"HostConfig": {"Binds": []}, "hostconfig": {"Binds": ["/etc:/x"]}}',
        '{"HostConfig": {"Mounts": [{"Type": "bind", "Source": "/etc", "type": "tmpfs"}]}}',
    ],
)
def test_names_are_found_as_the_engine_finds_them_and_only_once(text):
    with pytest.raises(UsageError, match=r"no directory /etc|more than once"):
        read_creation(text.encode(), ())


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"HostConfig": {"DeviceRequests": [{"Capabilities": [["gpu"]], "Count": "x"}]}}',
        b'{"HostConfig": {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": 3}]}}',
        b'{"HostConfig": {"DeviceRequests": [{"Capabilities": 3}]}}',
    ],
)
def test_what_cannot_be_understood_is_left_to_the_engine(body):
    assert read_creation(body, GPUS).body is body


def test_gpus_become_devices_of_the_session():
    every = [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]}]
    assert devices(wish(DeviceRequests=[request(Count=-1)])) == every
    assert devices(wish(DeviceRequests=[request(Count=2)])) == every
    assert devices(wish(DeviceRequests=[request(DeviceIDs=["0", "1"])])) == every
    one = [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=1"]}]
    assert devices(wish(DeviceRequests=[request(DeviceIDs=["1"])])) == one


def test_a_device_by_its_name_passes_and_all_are_those_of_the_session():
    named = {"Driver": "cdi", "DeviceIDs": ["acme.com/fpga=a"]}
    assert devices(wish(DeviceRequests=[named])) == [named]
    every = {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}
    assert devices(wish(DeviceRequests=[every]))[0]["DeviceIDs"] == list(GPUS[:2])


@pytest.mark.parametrize(
    "wanted",
    [
        request(Count=3),
        request(DeviceIDs=["7"]),
        {"Driver": "cdi", "DeviceIDs": ["acme.com/fpga=b"]},
        {"Driver": "cdi", "DeviceIDs": ["other.com/x=all"]},
    ],
)
def test_devices_of_others_are_refused_with_what_there_is(wanted):
    with pytest.raises(DeviceUnavailableError, match=r"nvidia\.com/gpu=0") as caught:
        read_creation(wish(DeviceRequests=[wanted]), GPUS)
    assert "--gpu" in caught.value.hint


def test_a_session_without_devices_says_so():
    with pytest.raises(DeviceUnavailableError, match="it has no devices"):
        read_creation(wish(DeviceRequests=[request(Count=-1)]), ())


def test_the_volume_with_models_is_noticed_however_it_is_named():
    assert read_creation(wish(Binds=["offload-models:/models"]), ()).models
    mount = {"Type": "volume", "Source": "offload-models", "Target": "/models"}
    assert read_creation(wish(Mounts=[mount]), ()).models
    assert not read_creation(wish(Binds=["models:/offload-models"]), ()).models


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b'{"HostConfig": 3}', b'"x"'])
def test_what_is_no_wish_is_left_to_the_engine(body):
    assert read_creation(body, ()).body == body
