"""The supervision of a real buildkitd."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload_builder.buildkit import (
    BkSession,
    BuildkitDaemon,
    DaemonSettings,
    SessionProviders,
    SolveResult,
    SolveSpec,
)
from offload_builder.buildkit.daemon_leftovers import leftover_bundles, mounts_below
from offload_core.errors import NodeLostError
from tests.fixtures.buildkit import BASE, TOOLS, build, dockerfile_source, running_daemon

REPOSITORY = Path(__file__).resolve().parents[2]


def settings(root: Path, **values) -> DaemonSettings:
    return DaemonSettings(root=root, search=[TOOLS], **values)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def gone(pid: int, timeout: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout
    while alive(pid) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return not alive(pid)


async def sleeping_build(daemon: BuildkitDaemon, session: BkSession, seconds: str) -> asyncio.Task:
    """Start a build and return when its step runs."""
    spec = SolveSpec({"filename": "Dockerfile"})
    solving = asyncio.create_task(daemon.client.solve(spec, session))
    async with asyncio.timeout(30):
        async for batch in daemon.client.status(spec.ref):
            if any(b"running" in log.data for log in batch.logs):
                return solving
    raise AssertionError("the step did not run")


def sleeping_source(seconds: str):
    return dockerfile_source(BASE + f"RUN echo running; /bin/busybox sleep {seconds}\n")


def step_pids(seconds: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"/bin/busybox\0sleep\0{seconds}\0".encode():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def test_it_starts_on_demand_and_stops_without_a_trace(tmp_path):
    async with BuildkitDaemon(settings(tmp_path)) as daemon:
        assert not daemon.running
        infos = await asyncio.gather(*(daemon.ensure_running() for _ in range(5)))
        assert len({info.worker_id for info in infos}) == 1
        assert "linux/amd64" in infos[0].platforms
        pid, run_dir = daemon.pid, daemon.socket_path.parent
        assert alive(pid)
        assert len(str(daemon.socket_path)) < 107
    assert not alive(pid)
    assert not run_dir.exists()
    assert (await daemon.exited).expected
    assert (tmp_path / "buildkitd.log").stat().st_size > 0


async def kill_at_work(daemon, seconds):
    """Kill the daemon while a step of its sleeps for so long."""
    async with BkSession(
        daemon.client, "k", SessionProviders(source=sleeping_source(seconds))
    ) as session:
        solving = await sleeping_build(daemon, session, seconds)
        os.kill(daemon.pid, signal.SIGKILL)
        with pytest.raises(NodeLostError, match="killed by SIGKILL"):
            await asyncio.wait_for(solving, 10)
        async with asyncio.timeout(5):
            await session.lost.wait()


async def test_a_kill_during_a_build_is_reported_and_repaired(tmp_path):
    async with running_daemon(tmp_path) as daemon:
        await kill_at_work(daemon, "4712.5")
        ended = await daemon.exited
        assert (ended.signal, ended.expected, ended.out_of_memory) == (9, False, False)
        assert not daemon.running

        await daemon.ensure_running()
        assert step_pids("4712.5") == []
        assert leftover_bundles(tmp_path) == []
        result = await build(
            daemon.client, SessionProviders(source=dockerfile_source(BASE + "RUN echo again\n"))
        )
        assert isinstance(result, SolveResult)


async def test_stopping_ends_running_builds_and_their_steps(tmp_path):
    async with running_daemon(tmp_path) as daemon:
        providers = SessionProviders(source=sleeping_source("4713.5"))
        async with BkSession(daemon.client, "k", providers) as session:
            solving = await sleeping_build(daemon, session, "4713.5")
            began = time.monotonic()
            await daemon.stop(grace=3.0)
            assert time.monotonic() - began < 8
            with pytest.raises(NodeLostError, match="stopped"):
                await asyncio.wait_for(solving, 10)
        assert step_pids("4713.5") == []
        assert mounts_below(tmp_path) == []


async def test_a_step_whose_bundle_buildkit_has_deleted_is_ended_too(tmp_path):
    async with running_daemon(tmp_path) as daemon:
        await kill_at_work(daemon, "4714.5")
        for bundle in leftover_bundles(tmp_path):
            (bundle / "config.json").unlink()
        assert leftover_bundles(tmp_path) == []
        assert len(step_pids("4714.5")) == 1
        await daemon.stop()
        assert step_pids("4714.5") == []


async def test_it_dies_with_an_agent_that_is_killed(tmp_path):
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from offload_builder.buildkit import BuildkitDaemon, DaemonSettings
async def main():
    async with BuildkitDaemon(DaemonSettings(root=Path({str(tmp_path)!r}),
                                             search=[Path({str(TOOLS)!r})])) as daemon:
        await daemon.ensure_running()
        print("PID", daemon.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE
    )
    pid = 0
    async with asyncio.timeout(30):
        while not pid:
            line = await agent.stdout.readline()
            assert line
            if line.startswith(b"PID"):
                pid = int(line.split()[1])
    assert alive(pid)
    agent.kill()
    await agent.wait()
    assert await gone(pid)
    # The root directory is usable at once, in spite of what the daemon left.
    async with running_daemon(tmp_path) as daemon:
        assert daemon.running


async def test_a_daemon_of_an_earlier_agent_is_ended(tmp_path):
    orphan = subprocess.Popen(
        [str(TOOLS / "buildkitd"), f"--root={tmp_path}", f"--addr=unix://{tmp_path}/s"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reaper = asyncio.create_task(asyncio.to_thread(orphan.wait))
    (tmp_path / "buildkitd.pid").write_text(str(orphan.pid))
    while not (tmp_path / "buildkitd.lock").exists():
        await asyncio.sleep(0.02)
    async with running_daemon(tmp_path) as daemon:
        assert daemon.running
        await asyncio.wait_for(reaper, 5)


async def test_a_daemon_that_cannot_start_says_why(tmp_path):
    daemon = BuildkitDaemon(settings(tmp_path, snapshotter="no-such"))
    async with daemon:
        with pytest.raises(NodeLostError, match='unknown snapshotter name: "no-such"'):
            await daemon.ensure_running()


async def test_a_restart_keeps_the_cache(tmp_path):
    async with running_daemon(tmp_path) as daemon:
        providers = SessionProviders(source=dockerfile_source(BASE + "RUN echo hi > /x\n"))
        await build(daemon.client, providers)
        before = {r.id for r in await daemon.client.disk_usage() if not r.mutable}
        assert before
        first = daemon.pid
        await daemon.restart()
        assert daemon.pid != first
        assert before <= {record.id for record in await daemon.client.disk_usage()}


async def test_wiping_the_ingest_leaves_the_rest(tmp_path):
    async with running_daemon(tmp_path) as daemon:
        stuck = tmp_path / "runc-overlayfs" / "content" / "ingest" / "abc"
        stuck.mkdir(parents=True)
        (stuck / "data").write_bytes(b"wrong")
        assert await daemon.wipe_ingest() == 1
        assert not stuck.exists()
        result = await build(
            daemon.client, SessionProviders(source=dockerfile_source(BASE + "RUN echo hi\n"))
        )
        assert isinstance(result, SolveResult)


async def test_a_command_prefix_is_used_and_dies_too(tmp_path):
    prefix = ["unshare", "--mount", "--fork", "--"]
    async with running_daemon(tmp_path, command_prefix=prefix) as daemon:
        assert Path(f"/proc/{daemon.pid}/exe").readlink().name == "unshare"
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        daemon_pid = int(children[0])
        result = await build(
            daemon.client, SessionProviders(source=dockerfile_source(BASE + "RUN echo hi\n"))
        )
        assert isinstance(result, SolveResult)
    assert await gone(daemon_pid)
