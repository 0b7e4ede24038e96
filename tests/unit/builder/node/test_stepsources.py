from __future__ import annotations

import json
import time

import pytest

from offload_builder.node.mounts.gate import Step
from offload_builder.node.stepsources import StepSources


@pytest.fixture
def leases(tmp_path):
    folder = tmp_path / "leases"
    folder.mkdir()
    (folder / "last_reserved_ip.0").write_text("10.78.0.3")
    return folder


def bundle(tmp_path, name: str, command: str, namespace: str | None) -> Step:
    folder = tmp_path / name
    folder.mkdir()
    spaces = [{"type": "pid"}]
    if namespace is not None:
        spaces.append({"type": "network", "path": f"/root/net/cni/{namespace}"})
    config = {"process": {"args": ["/bin/sh", "-c", command]}, "linux": {"namespaces": spaces}}
    (folder / "config.json").write_text(json.dumps(config))
    return Step(1, folder)


def sources(leases) -> StepSources:
    found = StepSources()
    found.leases = lambda: leases
    return found


async def test_a_step_is_found_by_the_addresses_of_its_namespace(tmp_path, leases):
    (leases / "10.78.0.2").write_text("space-a\r\neth0")
    (leases / "fd00::2").write_text("space-a\r\neth0")
    (leases / "10.78.0.3").write_text("space-b\r\neth0")
    known = sources(leases)
    await known.begin(bundle(tmp_path, "one", "make a", "space-a"))
    await known.begin(bundle(tmp_path, "two", "make b", "space-b"))
    for address, command in (
        ("10.78.0.2", "make a"),
        ("fd00::2", "make a"),
        ("10.78.0.3", "make b"),
    ):
        step = known.at(address)
        assert step is not None
        assert step.arguments[-1] == command
    assert known.at("10.78.0.9") is None
    assert len(known.running()) == 2


async def test_a_namespace_that_is_used_again_belongs_to_the_newest_step(tmp_path, leases):
    (leases / "10.78.0.2").write_text("space\r\neth0")
    known = sources(leases)
    first = bundle(tmp_path, "one", "make a", "space")
    await known.begin(first)
    first.ended.set()
    await known.begin(bundle(tmp_path, "two", "make b", "space"))
    # runc has not run anything of the second one yet.
    assert known.at("10.78.0.2").arguments[-1] == "make a"
    time.sleep(0.02)
    assert known.at("10.78.0.2").arguments[-1] == "make b"
    assert [step.arguments[-1] for step in known.running()] == ["make b"]


async def test_steps_without_a_network_of_their_own_are_kept_apart(tmp_path, leases):
    known = sources(leases)
    await known.begin(bundle(tmp_path, "one", "make a", None))
    assert [step.arguments[-1] for step in known.on_host()] == ["make a"]
    assert known.running() == []


async def test_a_bundle_that_cannot_be_read_stops_nothing(tmp_path, leases):
    known = sources(leases)
    await known.begin(Step(1, tmp_path / "gone"))
    assert known.running() == []
