"""Which device nodes, files and specifications an engine gets for its devices."""

from __future__ import annotations

import json

import pytest

from offload_builder.node.sessions.engine.devices import find_devices
from offload_core.errors import DeviceUnavailableError

YAML = """\
cdiVersion: 0.5.0
kind: vendor.com/kind
containerEdits:
  env: ["SHARED=1"]
  mounts:
    - {hostPath: /usr, containerPath: /u}
    - {hostPath: /../etc/shadow, containerPath: /s}
devices:
  - name: a
    containerEdits:
      deviceNodes: [{path: /dev/a, hostPath: /dev/null}]
  - name: b
    containerEdits:
      deviceNodes: [{path: /dev/zero}, {path: /etc/elsewhere, hostPath: /dev/full}]
  - name: c
    containerEdits:
      deviceNodes: [{path: /dev/c, hostPath: /usr}]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.yaml").write_text(YAML)
    return tmp_path


def test_nodes_are_made_under_both_names_and_only_those_of_chosen_devices(folder):
    found = find_devices((folder,), ["vendor.com/kind=a"])

    assert {node[0] for node in found.nodes} == {"/dev/a", "/dev/null"}
    assert {node[1:] for node in found.nodes} == {("c", 1, 3)}


def test_places_outside_of_dev_and_paths_that_lead_up_are_left_out(folder):
    found = find_devices((folder,), ["vendor.com/kind=b", "vendor.com/kind=c"])

    assert {node[0] for node in found.nodes} == {"/dev/zero", "/dev/full"}
    assert found.files == ("/usr",)


def test_all_means_the_devices_that_the_engine_has(folder):
    found = find_devices((folder,), ["vendor.com/kind=a", "vendor.com/kind=b"])

    ((path, text),) = found.specifications
    written = json.loads(text)
    edits = {device["name"]: device["containerEdits"] for device in written["devices"]}
    assert path.endswith(".json")
    assert sorted(edits) == ["a", "all", "b"]
    assert [node["path"] for node in edits["all"]["deviceNodes"]] == [
        "/dev/a", "/dev/zero", "/etc/elsewhere"
    ]  # fmt: skip
    assert edits["all"]["env"] == ["SHARED=1"]


def test_nothing_is_read_for_an_engine_without_devices(tmp_path):
    assert find_devices((tmp_path / "none",), []).specifications == ()


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(DeviceUnavailableError, match=r"vendor\.com/kind=z"):
        find_devices((folder,), ["vendor.com/kind=z"])
