"""Images of builds that were left: they come back, and go to registries, without a new build."""

from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.engine import DockerEngine
from tests.fixtures.registry import PASSWORD, DockerRegistry
from tests.fixtures.relayedpool import RelayedPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

LARGE_BYTES = 60 << 20
LOST = "the connection was lost; coming back ..."


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    with RelayedPool() as running:
        yield running


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    with DockerEngine("graphdriver") as running:
        yield running


@pytest.fixture
def member(relayed: RelayedPool, engine: DockerEngine) -> Member:
    relayed.relay.reset()
    return relayed.member(DOCKER_HOST=engine.host)


def docker(engine: DockerEngine, *arguments: str) -> str:
    done = subprocess.run(
        ["docker", "-H", engine.host, *arguments],
        capture_output=True, text=True, timeout=60, env=engine.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def leave_behind(member: Member, folder: Path, *options: str) -> str:
    """Leave a build with an image, wait for its end, return its id."""
    context = make_context(folder, 'RUN date > /made; sleep 0.5\nCMD ["echo", "came back"]\n')
    left = member.build("--detach", "--save", *options, context)
    assert left.returncode == 0, left.stderr
    build_id = left.stdout.strip()
    ended = member.offload("attach", "--progress", "plain", build_id)
    assert ended.returncode == 0, ended.stderr
    return build_id


def test_pull_brings_the_image_once(member: Member, engine: DockerEngine, tmp_path: Path) -> None:
    build_id = leave_behind(member, tmp_path / "c")
    first = member.offload("pull", build_id[:-3], "-t", "pulled", "-t", "pulled:2")
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", first.stdout)
    assert docker(engine, "run", "--rm", "--network", "none", "pulled:2") == "came back\n"
    again = member.offload("pull", build_id, "-t", "pulled:3", "--progress", "plain")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert "0 layers received (0B)" in again.stderr


def test_pull_of_what_has_no_image_says_so(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN exit 3\n")
    assert member.build(context).returncode == 1
    build_id = member.builds()[0]["build_id"]
    done = member.offload("pull", build_id)
    assert done.returncode == 125
    assert f"build {build_id} has no image: it has ended as failed" in done.stderr
    unknown = member.offload("pull", "zzzz")
    assert unknown.returncode == 5, unknown.stderr


def test_push_uses_the_logins_of_docker(member: Member, tmp_path: Path) -> None:
    build_id = leave_behind(member, tmp_path / "c")
    with DockerRegistry(tmp_path / "registry") as registry:
        name = f"{registry.address}/team/app:1"
        refused = member.offload("push", build_id, name)
        assert refused.returncode == 8, refused.stderr
        registry.write_login(member.home)
        pushed = member.offload("push", build_id, name, f"{registry.address}/team/app:2")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == member.builds()[0]["image_digest"]
        assert f"pushed {name}" in pushed.stderr
        assert PASSWORD not in pushed.stderr


def test_load_goes_on_after_a_cut(
    relayed: RelayedPool, member: Member, engine: DockerEngine, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", f"RUN head -c {LARGE_BYTES} /dev/urandom > /large\n")
    client = member.start("--load", "-t", "large", context)
    assert client.stderr is not None
    deadline = time.monotonic() + 60
    while relayed.relay.down_bytes < 5 << 20:
        assert time.monotonic() < deadline and client.poll() is None
        time.sleep(0.002)
    relayed.relay.cut()
    with client:
        shown = client.stderr.read()
    assert client.returncode == 0, shown
    assert shown.count(LOST) == 1
    assert relayed.relay.down_bytes < LARGE_BYTES + (24 << 20)
    assert docker(engine, "image", "inspect", "large", "--format", "{{.Size}}")
    assert member.builds()[0]["state"] == "succeeded"
