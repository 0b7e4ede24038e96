"""Builds and images whose node is lost: repeated elsewhere, and still there."""

from __future__ import annotations

import json
import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.lossypool import LossyPool
from tests.fixtures.pool import wait_for_text
from tests.fixtures.registry import DockerRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

STEPS = "RUN echo begun; for n in 1 2 3; do echo line $n; sleep 1; done; echo whole\n"
REMARK = "what follows is a new run of it, from its beginning"


@pytest.fixture
def two() -> Iterator[LossyPool]:
    with LossyPool("one", "two") as running:
        yield running


def rest_of(process: subprocess.Popen[str], timeout: float = 60) -> str:
    _, errors = process.communicate(timeout=timeout)
    return errors


def test_build_is_repeated_at_another_node_and_says_so(two: LossyPool, tmp_path: Path) -> None:
    member = two.member()
    context = make_context(tmp_path / "c", STEPS)
    with DockerRegistry(tmp_path / "registry") as registry:
        registry.write_login(member.home)
        name = f"{registry.address}/team/app:1"
        building = member.start("--push", "-t", name, context)
        before = wait_for_text(building, "line 2")
        lost = member.builds()[0]
        two.kill(lost["node_id"])
        shown = rest_of(building)
        assert building.returncode == 0, shown
    first, _, second = (before + shown).partition(REMARK)
    assert f"node {lost['node_id']} was lost with build {lost['build_id']}" in first
    assert second.startswith(" (repeat 1 of 2)\n")
    # Numbers of steps are not used again, and the new run is whole.
    numbers = [set(re.findall(r"^#(\d+) ", text, re.MULTILINE)) for text in (first, second)]
    assert not numbers[0] & numbers[1]
    assert re.findall(r" line (\d)$", second, re.MULTILINE) == ["1", "2", "3"]
    assert re.search(r"^#\d+ CANCELED$", first, re.MULTILINE), first
    new, old = member.builds()[:2]
    assert (old["build_id"], old["state"]) == (lost["build_id"], "lost")
    assert (new["state"], new["repeat_of"]) == ("succeeded", old["build_id"])
    assert old["repeated_by"] == new["build_id"]
    assert new["node_id"] != old["node_id"]
    table = member.offload("builds").stdout
    assert f"lost, repeated as {new['build_id']}" in table
    # Who looks at the lost one is led to its repeat.
    looking = member.offload("attach", "--progress", "plain", old["build_id"])
    assert looking.returncode == 0, looking.stderr
    assert f"its repeat {new['build_id']}" in looking.stderr
    assert "whole" in looking.stderr
    text = member.offload("inspect", old["build_id"]).stdout
    assert re.search(rf"^Repeated as: +{new['build_id']}$", text, re.MULTILINE), text


def test_rawjson_keeps_the_runs_apart_and_a_file_is_whole(two: LossyPool, tmp_path: Path) -> None:
    member = two.member()
    context = make_context(tmp_path / "c", STEPS + "RUN head -c 3000000 /dev/zero > /made\n")
    target = tmp_path / "out.tar"
    building = subprocess.Popen(
        member.command("offload-build", "--progress", "rawjson", "-o", f"type=tar,dest={target}",
                       context),
        stderr=subprocess.PIPE, text=True, env=member.environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(item["state"] == "running" for item in member.builds()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = wait_for_text(building, "YmVndW4K")  # "begun\n" in base64
    two.kill(member.builds()[0]["node_id"])
    shown = before + rest_of(building)
    assert building.returncode == 0, shown
    assert target.stat().st_size > 3_000_000
    runs: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if line.startswith("{"):
            for vertex in json.loads(line).get("vertexes", ()):
                if "echo begun" in vertex.get("name", "") and vertex.get("completed"):
                    runs.setdefault(vertex["digest"], []).append(vertex.get("error", ""))
    assert list(runs.values()) == [["context canceled"], [""]], runs


def test_build_that_loses_every_node_is_given_up(tmp_path: Path) -> None:
    with LossyPool("one", "two") as pool:
        member = pool.member(OFFLOAD_REPEATS="1")
        building = member.start(make_context(tmp_path / "c", STEPS))
        shown = wait_for_text(building, "begun")
        for _ in range(2):
            pool.kill(member.builds()[0]["node_id"])
            if REMARK not in shown:
                shown += wait_for_text(building, REMARK)
                shown += wait_for_text(building, " begun")
        shown += rest_of(building)
        assert building.returncode == 7, shown
        assert shown.count(REMARK) == 1
        assert "it was repeated once and lost again; run it again" in shown
        assert len(re.findall(r"^ERROR: ", shown, re.MULTILINE)) == 1, shown


def test_detached_build_that_is_lost_says_to_run_it_again(tmp_path: Path) -> None:
    with LossyPool("one", "two") as pool:
        member = pool.member()
        left = member.build("--detach", make_context(tmp_path / "c", STEPS + "RUN sleep 60\n"))
        assert left.returncode == 0, left.stderr
        build_id = left.stdout.strip()
        pool.kill(member.builds()[0]["node_id"])
        looking = member.offload("attach", "--progress", "plain", build_id)
        assert looking.returncode == 7, looking.stderr
        assert re.search(r"^ERROR: node \w+ was lost.*again", looking.stderr, re.MULTILINE), (
            looking.stderr
        )
        assert [item["state"] for item in member.builds()] == ["lost"]


def test_stopped_node_hands_its_build_to_another(tmp_path: Path) -> None:
    with LossyPool() as pool:
        for name in ("one", "two"):
            pool.start_node(name, OFFLOAD_NODE_DRAIN_TIMEOUT="500ms")
        member = pool.member()
        building = member.start(make_context(tmp_path / "c", STEPS))
        wait_for_text(building, "begun")
        first = member.builds()[0]
        pool.kill(first["node_id"], 15)
        shown = rest_of(building)
        assert building.returncode == 0, shown
        assert shown.count(REMARK) == 1, shown
        new, old = member.builds()
        assert (old["state"], new["state"]) == ("lost", "succeeded")
        assert "the node was stopped while the build ran" in old["error"]


def saved(member: Member, build_id: str) -> bool:
    return next(item for item in member.builds() if item["build_id"] == build_id)["image_saved"]


def test_saved_image_is_had_without_its_node(tmp_path: Path) -> None:
    with LossyPool("one", shared=True) as pool:
        token = pool.create_token("ann")
        member, other = pool.member(token), pool.member(pool.create_token("bob"))
        context = make_context(tmp_path / "c", "RUN head -c 3000000 /dev/urandom > /made\n")
        done = member.build("--save", "--detach", context)
        assert done.returncode == 0, done.stderr
        build_id = done.stdout.strip()
        deadline = time.monotonic() + 40
        while not saved(member, build_id):
            assert time.monotonic() < deadline, pool.log("one")
            time.sleep(0.2)
        digest = member.builds()[0]["image_digest"]
        pool.kill("one")
        pool.start_node("two")
        with DockerRegistry(tmp_path / "registry") as registry:
            registry.write_login(member.home)
            registry.write_login(other.home)
            name = f"{registry.address}/team/app:1"
            pushed = member.offload("push", build_id, name)
            assert pushed.returncode == 0, pushed.stderr + pool.log("two")
            assert pushed.stdout.strip() == digest
            # It is a member's own, as at its own node.
            refused = other.offload("push", build_id, name)
            assert refused.returncode != 0
            assert "does not answer" in refused.stderr or "no node can give" in refused.stderr
        text = member.offload("inspect", build_id).stdout
        assert "Image Saved:" in text


def test_image_that_was_on_its_way_when_its_node_was_killed_is_saved_later(tmp_path: Path) -> None:
    with LossyPool("one", shared=True) as pool:
        assert pool.minio is not None
        member = pool.member()
        assert member.build(make_context(tmp_path / "a", "RUN echo warm\n")).returncode == 0
        pool.minio.stop()
        done = member.build("--save", make_context(tmp_path / "c", "RUN date > /made\n"))
        assert done.returncode == 0, done.stderr
        build_id = member.builds()[0]["build_id"]
        assert not saved(member, build_id)
        pool.kill("one")
        gone = member.offload("pull", build_id)
        assert gone.returncode == 5, gone.stderr
        assert "is not attached" in gone.stderr
        pool.minio.start()
        pool.start_node("one")
        deadline = time.monotonic() + 60
        while not saved(member, build_id):
            assert time.monotonic() < deadline, pool.log("one")
            time.sleep(0.2)


def test_failed_build_has_its_numbers_and_its_inspection_is_complete(tmp_path: Path) -> None:
    with LossyPool("one") as pool:
        member = pool.member()
        steps = "RUN echo a; sleep 1.1\nRUN echo the-cause; exit 9\n"
        done = member.build(make_context(tmp_path / "c", steps))
        assert done.returncode == 1
        head, _, error = done.stderr.rpartition("ERROR: ")
        assert "exit code: 9" in error
        assert re.search(r"^\[offload\] 0 of 4 steps cached; context .* sent", head, re.MULTILINE)
        assert re.search(r"^\[offload\] \d\.\ds: steps \d\.\ds \(longest: ", head, re.MULTILINE)
        build_id = member.builds()[0]["build_id"]
        text = member.offload("inspect", build_id).stdout
        assert re.search(r"^Status: +failed$", text, re.MULTILINE), text
        assert re.search(r"^Build Steps: +4 \(0% cached\)$", text, re.MULTILINE), text
        assert re.search(r"^error +\d\.\ds +\[4/4\] RUN echo the-cause", text, re.MULTILINE), text
        assert re.search(r"^Last output of \[4/4\] RUN .*:\n  the-cause$", text, re.MULTILINE), text
        assert re.search(r"^Error: .*exit code: 9$", text, re.MULTILINE), text
        values = json.loads(member.offload("inspect", build_id, "--format", "json").stdout)
        assert [step["last_output"] for step in values["steps"] if step["error"]] == [["the-cause"]]
