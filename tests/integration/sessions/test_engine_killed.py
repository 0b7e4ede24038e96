"""A node that is killed: its engines end with it, and the next one removes the rest."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_builder.buildkit.daemon_rundir import run_directory
from offload_builder.node.sessions.engine.groups import EngineGroups
from offload_builder.node.sessions.engine.host import EngineHost
from offload_builder.node.sessions.engine.idranges import COUNT, FOLDER
from offload_builder.node.sessions.engine.loops import devices_of
from offload_builder.node.sessions.engine.settings import FIRST_ID
from tests.fixtures.sessionengines import docker, engine_settings, import_image
from tests.fixtures.sessionnetwork import LoneNetworks

pytestmark = pytest.mark.timeout(300)
OURS = FIRST_ID + 2000 * COUNT
"""Users of these engines only, so that others on this machine are not counted."""
SECONDS = 60
_NODE = """
import asyncio, sys
from pathlib import Path
from offload_builder.node.sessions.engine.host import EngineHost
from tests.fixtures.sessionengines import LIMITS, engine_settings, spec
from tests.fixtures.sessionnetwork import LoneNetworks

async def main():
    settings = engine_settings(
        Path(sys.argv[1]), ready=1, ready_limits=LIMITS, first_id=int(sys.argv[2])
    )
    async with EngineHost(settings, LoneNetworks()) as host:
        while True:
            engine = await host.create(spec())
            print("socket", engine.socket, flush=True)
            if sys.argv[3] == "hold":
                await asyncio.sleep(1000)
            await host.pause(engine)
            await host.wake(engine)
            await host.remove(engine.engine_id)

asyncio.run(main())
"""


@contextmanager
def running(data: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    node = subprocess.Popen(
        [sys.executable, "-c", _NODE, str(data), str(OURS), what],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    with node:
        try:
            yield node
        finally:
            node.kill()


def first_socket(node: subprocess.Popen[str]) -> str:
    assert node.stdout is not None
    return next(line.split()[1] for line in node.stdout if line.startswith("socket "))


def processes(data: Path) -> list[int]:
    """Return processes of our engines, and those that would start one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            user = path.stat().st_uid
            mounts = (path / "mountinfo").read_text() if user < FIRST_ID else ""
        except OSError:
            continue
        if OURS <= user < OURS + 2000 * COUNT or str(data) in mounts:
            found.append(int(path.name))
    return found


def wait_for_end(data: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while (left := processes(data)) or devices_of(data):
        assert time.monotonic() < deadline, (left, devices_of(data))
        time.sleep(0.05)


def leftovers(data: Path) -> list[str]:
    groups = EngineGroups(data, "none").own()
    above = {Path(folder).parent.parent for _, folder in groups}
    found = [str(path) for path in above if path.exists()]
    found += [str(path) for path in data.glob("*")]
    found += [str(path) for path in run_directory(data).glob("*")]
    found += [str(path) for path in FOLDER.glob("*") if int(path.name) >= OURS]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines()
              if str(data) in line]  # fmt: skip
    return found + devices_of(data)


async def sweep(data: Path) -> None:
    async with EngineHost(engine_settings(data), LoneNetworks()):
        pass


async def test_nothing_is_left_of_a_node_that_is_killed_at_any_point(tmp_path):
    data = tmp_path / "data"
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for number in range(6):
        with running(data, "change") as node:
            if number % 2:
                first_socket(node)
            time.sleep(chance.uniform(0, 1.5 if number % 2 else 3))

        # By themselves, before anybody looks after them.
        wait_for_end(data)
        await sweep(data)

        assert leftovers(data) == [], seed


async def test_containers_end_with_the_node_and_a_second_sweep_has_nothing_to_do(tmp_path):
    data = tmp_path / "data"
    with running(data, "hold") as node:
        engine = type("Running", (), {"socket": first_socket(node)})()
        import_image(engine)
        begun = docker(engine, "run", "-d", "--privileged", "box", "sleep", "1000")
        assert begun.returncode == 0, begun.stderr
        assert leftovers(data)

    wait_for_end(data)
    await sweep(data)
    assert leftovers(data) == []
    await sweep(data)

    assert leftovers(data) == []


async def test_a_process_that_outlived_its_node_is_ended_by_the_next_one(tmp_path):
    """Nothing relies on the kernel's having ended it: here it is one that the kernel does not."""
    data = tmp_path / "data"
    folder = data / "0123456789ab"
    folder.mkdir(parents=True)
    groups = EngineGroups(data, folder.name)
    groups.make(OURS, [])
    with subprocess.Popen(["sleep", "1000"]) as left:
        for _, group in groups.own():
            Path(group, "cgroup.procs").write_text(str(left.pid))
        await sweep(data)
        code = left.wait(SECONDS)

    assert code == -9
    assert leftovers(data) == []
