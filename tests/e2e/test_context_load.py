"""Many clients, much data and slow parts: content comes once, memory stays bounded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.relayedpool import RelayedPool
from tests.fixtures.trees import (
    DATA_DOCKERFILE,
    DATA_TREE_BYTES,
    data_tree,
    noise,
    of_directory,
    of_tar,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

LOST_BYTES = 3 << 20
"""On the way when a client leaves or a connection breaks, at most."""


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    """One node behind a relay that throttles."""
    with RelayedPool() as running:
        yield running


@pytest.fixture
def member(relayed: RelayedPool) -> Iterator[Member]:
    """Somebody who is logged in; the relay is at rest before and after."""
    relayed.relay.reset()
    yield relayed.member()
    relayed.relay.reset()


def test_five_clients_with_the_same_tree_send_it_once(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "at once")
    members = [relayed.member() for _ in range(5)]
    relayed.relay.reset()
    relayed.relay.rate = 20e6
    builds = [
        one.start("-o", f"type=tar,dest={tmp_path}/{number}.tar", context)
        for number, one in enumerate(members)
    ]
    for building in builds:
        _, errors = building.communicate(timeout=90)
        assert building.returncode == 0, errors
    assert relayed.relay.up_bytes <= 1.1 * DATA_TREE_BYTES
    member.wait_state("succeeded")
    newest = [build["stats"] for build in member.builds()[:5]]
    assert sum(stats["context_sent_bytes"] for stats in newest) <= 1.1 * DATA_TREE_BYTES
    expected = of_directory(context / "data")
    archives = {(tmp_path / f"{number}.tar").read_bytes() for number in range(5)}
    assert len(archives) == 1
    assert of_tar(tmp_path / "0.tar") == expected


def test_client_that_sends_for_others_may_leave(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "leaving")
    second = relayed.member()
    relayed.relay.reset()
    relayed.relay.rate = 8e6
    leaving = member.start(context)
    while relayed.relay.up_bytes < 3_000_000:
        assert leaving.poll() is None, leaving.communicate()
        time.sleep(0.01)
    staying = second.start("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    while relayed.relay.up_bytes < 12_000_000:
        assert staying.poll() is None, staying.communicate()
        time.sleep(0.01)
    leaving.kill()
    leaving.communicate(timeout=20)
    relayed.relay.rate = None
    _, errors = staying.communicate(timeout=60)
    assert staying.returncode == 0, errors
    assert of_tar(tmp_path / "out.tar") == of_directory(context / "data")
    assert relayed.relay.up_bytes <= DATA_TREE_BYTES + LOST_BYTES


def test_slow_link_holds_the_reading_back(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    small = write_files(tmp_path / "s", {"data": "x", "Dockerfile": DATA_DOCKERFILE})
    idle = _peak_memory(relayed, member, small, 0)
    block = noise("block", 1 << 20)
    context = write_files(tmp_path / "c", {"Dockerfile": DATA_DOCKERFILE})
    (context / "data").mkdir()
    with (context / "data/large").open("wb") as large:
        for number in range(160):
            large.write(number.to_bytes(8) + block)
    for number in range(100):
        (context / f"data/{number}").write_bytes(noise(("small", number), 300_000))
    relayed.relay.rate = 4e6
    assert _peak_memory(relayed, member, context, 12_000_000) - idle < 80 << 20


def _peak_memory(relayed: RelayedPool, member: Member, context: Path, until: int) -> int:
    """Build until so many bytes have passed; return the greatest memory of the client."""
    relayed.relay.up_bytes = 0
    building = member.start(context)
    peak = 0
    while building.poll() is None and (not until or relayed.relay.up_bytes < until):
        peak = max(peak, _memory(building.pid))
        time.sleep(0.01)
    if building.poll() is None:
        building.send_signal(signal.SIGINT)
    building.communicate(timeout=30)
    return peak


def _memory(pid: int) -> int:
    """Return the greatest resident size of a process so far."""
    try:
        with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) << 10 if found else 0


def test_buildkit_that_is_slow_does_not_fill_the_nodes_memory(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = write_files(tmp_path / "c", {"Dockerfile": DATA_DOCKERFILE})
    (context / "data").mkdir()
    block = noise("another block", 1 << 20)
    with (context / "data/large").open("wb") as large:
        for number in range(160):
            large.write(number.to_bytes(8) + block)
    assert member.build(write_files(tmp_path / "s", {"data": "x", "Dockerfile": DATA_DOCKERFILE}))
    daemon = _buildkitd(relayed)
    node = relayed.node.process.pid
    before = _memory(node)
    building = member.start("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    while relayed.relay.up_bytes < 20_000_000:
        assert building.poll() is None, building.communicate()
        time.sleep(0.01)
    os.kill(daemon, signal.SIGSTOP)
    try:
        time.sleep(2)
    finally:
        os.kill(daemon, signal.SIGCONT)
    _, errors = building.communicate(timeout=60)
    assert building.returncode == 0, errors
    assert _memory(node) - before < 120 << 20
    assert of_tar(tmp_path / "out.tar") == of_directory(context / "data")


def _buildkitd(relayed: RelayedPool) -> int:
    root = f"--root={relayed.folder}/node/projects/default/buildkit"
    done = subprocess.run(["pgrep", "-f", "--", root], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def test_build_goes_on_while_another_upload_is_cut_off(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    first = data_tree(tmp_path / "first", "one of two")
    second = data_tree(tmp_path / "second", "two of two")
    relayed.relay.rate = 24e6
    relayed.relay.cut_after(20_000_000)
    other = relayed.member()
    builds = [
        one.start("-o", f"type=tar,dest={tmp_path}/{name}.tar", context)
        for one, name, context in ((member, "first", first), (other, "second", second))
    ]
    for building in builds:
        _, errors = building.communicate(timeout=60)
        assert building.returncode == 0, errors
    for name, context in (("first", first), ("second", second)):
        assert of_tar(tmp_path / f"{name}.tar") == of_directory(context / "data")
