"""Devices in builds, from the command line: a pool where one node of two has one."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.buildkit import TOOLS
from tests.fixtures.cdi import HAVE, KIND, write_specification
from tests.fixtures.contexts import make_context
from tests.fixtures.platformpool import PlatformPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

GPU = f"{KIND}=all"
STEP = f"RUN --device={GPU},required {HAVE}\n"
BUILDS = 10


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    folder = tmp_path_factory.mktemp("cdi") / "specs"
    write_specification(folder)
    lines = 'isolation = "none"\nentitlements = ["device"]\ncdi_spec_dirs = {}'
    nodes = {"plain": lines.format("[]"), "gpu": lines.format(json.dumps([str(folder)]))}
    with PlatformPool(nodes) as pool:
        found = pool.member()
        deadline = time.monotonic() + 20
        while not any(node["devices"] for node in nodes_of(found)):
            assert time.monotonic() < deadline, pool.tails()
            time.sleep(0.2)
        yield found


def nodes_of(member: Member) -> list[dict[str, list[str]]]:
    done = member.offload("status", "--format", "json")
    assert done.returncode == 0, done.stderr
    nodes: list[dict[str, list[str]]] = json.loads(done.stdout)["nodes"]
    return nodes


def test_status_shows_which_node_has_which_device(member: Member) -> None:
    assert {node["node_id"]: node["devices"] for node in nodes_of(member)} == {
        "gpu": [f"{KIND}=0", GPU],
        "plain": [],
    }
    table = member.offload("status").stdout
    assert "DEVICES" in table and f"{KIND}=0,{GPU}" in table


def test_every_build_goes_to_the_node_with_the_device(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", STEP)
    for number in range(BUILDS):
        done = member.build("--allow", f"device={GPU}", "--build-arg", f"N={number}", context)
        assert done.returncode == 0, done.stderr
    assert [build["node_id"] for build in member.builds()[:BUILDS]] == ["gpu"] * BUILDS


def test_step_without_the_flag_is_refused_and_the_flag_named(
    member: Member, tmp_path: Path
) -> None:
    # Only a node that has a device can refuse it.
    context = make_context(tmp_path / "c", f"RUN --device={GPU} true\n")
    done = member.build("--allow", f"device={KIND}=0", context)
    assert done.returncode == 1 and f"Give --allow device={GPU}" in done.stderr, done.stderr


def test_device_that_no_node_has_is_refused_with_those_that_there_are(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c")
    before = [build["build_id"] for build in member.builds()]
    started = time.monotonic()
    assert member.build("--project", "nowhere", context).returncode == 5
    refused = time.monotonic()
    done = member.build("--allow", "device=acme.example/npu", context)
    assert done.returncode == 5, done.stderr
    # The start of the program aside, and what else this machine does.
    assert time.monotonic() - refused < 2 + (refused - started)
    text = f"no node of this pool has the device acme.example/npu; its nodes have {KIND}=0 and"
    assert text in done.stderr
    # At once: it neither waited in the queue nor was there a build at all.
    assert "waiting" not in done.stderr
    assert [build["build_id"] for build in member.builds()] == before


def test_name_that_is_none_is_refused_by_the_client(member: Member, tmp_path: Path) -> None:
    done = member.build("--allow", "device=gpu 0", make_context(tmp_path / "c"))
    assert done.returncode == 1 and "is no name of a device" in done.stderr


def test_bake_targets_get_their_devices_with_the_flag_only(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", STEP)
    target = {"context": str(context), "entitlements": [f"device={GPU}"]}
    file = tmp_path / "docker-bake.json"
    file.write_text(json.dumps({"target": {"default": target}}))
    bake = ("offload-build", "bake", "--progress", "plain", "-f", file)
    planner = str(TOOLS / "buildx")
    done = member.run(*bake, OFFLOAD_BUILDX=planner)
    assert done.returncode != 0 and f"add --allow device={GPU}" in done.stderr, done.stderr
    for allow in ("device", f"device={GPU}"):
        done = member.run(*bake, "--allow", allow, "--no-cache", OFFLOAD_BUILDX=planner)
        assert done.returncode == 0, done.stderr
        assert member.builds()[0]["node_id"] == "gpu"
