"""What all steps of one build together may use, and what happens to a build that wants more."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.stepgroups import OTHERS, trace_of
from offload_builder.node.buildgroups import HIERARCHY, ROOT, BuildGroups
from offload_builder.node.buildlimits import BuildLimits
from offload_proto.v1 import node_service_pb2 as node_pb
from tests.fixtures.buildx import Buildx
from tests.fixtures.llb import field, shell_definition
from tests.fixtures.node import NodePool, RawClient, wait_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from offload_builder.node.agent import NodeAgent

MIB = 1 << 20


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


@pytest.fixture
def disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="odk-"))
    yield folder
    folder.rmdir()


async def client_of(pool: NodePool, steps: str) -> RawClient:
    assigned = await pool.assigned()
    return RawClient(await pool.channel(assigned), assigned, steps)


async def result_of(client: RawClient) -> node_pb.Result:
    await client.start()
    result = await client.until("result")
    await client.done()
    return result


def printed(client: RawClient) -> str:
    logs = (entry.data for message in client.seen for entry in message.progress.logs)
    return b"".join(logs).decode()


def groups_left(agent: NodeAgent) -> list[str]:
    places = {runtime.groups.place for runtime in agent._projects.running()}
    found = (HIERARCHY / name / place.lstrip("/") for place in places for name in ("memory", ""))
    return [path.name for folder in found if folder.is_dir() for path in folder.iterdir()]


HUNGRY = "head -c {0} /dev/zero | tail -c {0} > /dev/null"


async def test_steps_of_a_build_share_its_memory_and_the_sentence_says_so(pool):
    agent = await pool.start_node(build_memory=96 * MIB)
    # Each is below the bound, both together are not.
    both = (
        f"RUN {HUNGRY.format(64_000_000)} & {HUNGRY.format(63_000_000)} & wait; sleep 1; exit 3\n"
    )
    failure = (await result_of(await client_of(pool, both))).failure
    assert failure.kind == node_pb.Failure.KIND_OUT_OF_MEMORY, failure
    assert "The build ran out of memory" in failure.message
    assert "limit of 96MiB" in failure.message and "build_memory" in failure.message
    one = f"RUN {HUNGRY.format(60_000_000)}\n"
    assert (await result_of(await client_of(pool, one))).HasField("success")
    await wait_free(agent)


async def test_step_that_starts_too_many_processes_stops_itself_only_and_is_told_why(pool):
    await pool.start_node(build_pids=64)
    neighbour = await client_of(
        pool, "RUN for i in $(seq 40); do sleep 2 & done; wait; echo fine\n"
    )
    bomb = await client_of(
        pool, "RUN for i in $(seq 200); do sleep 2 || exit 1 & done; wait; echo never\n"
    )
    beside = asyncio.ensure_future(result_of(neighbour))
    failure = (await result_of(bomb)).failure
    assert failure.process_exit_code, failure
    assert "as many processes as it may have, 64" in failure.message
    assert "build_pids" in failure.message
    assert (await beside).HasField("success")


async def test_group_of_a_build_is_named_by_its_trace_and_no_step_sees_the_trace(pool):
    agent = await pool.start_node(build_pids=500, build_cpus=1.5)
    client = await client_of(pool, "RUN cat /proc/self/cgroup; env; sleep 2\n")
    client.spec.cgroup_parent = "team/nightly"
    await client.start()
    await client.until_text(b"PATH=")
    shown = printed(client)
    assert "TRACEPARENT" not in shown
    trace = trace_of(client.assigned.build_id)
    (group,) = [
        path for folder in ("pids", "") for path in (HIERARCHY / folder / ROOT).glob(f"*/{trace}")
    ]
    assert (group / "pids.max").read_text() == "500\n"
    assert list(group.glob("offload/team/nightly/buildkit/*/cgroup.procs"))
    quota = HIERARCHY / "cpu" / group.relative_to(HIERARCHY / "pids") / "cpu.cfs_quota_us"
    assert quota.read_text() == "150000\n"
    await client.until("result")
    await client.done()
    await wait_free(agent)
    assert trace in groups_left(agent)
    # The trace is no part of a step's key: the next build finds it in the cache.
    again = await client_of(pool, "RUN cat /proc/self/cgroup; env; sleep 2\n")
    again.spec.cgroup_parent = "team/nightly"
    assert (await result_of(again)).stats.steps_cached == 3
    await wait_free(agent)
    name = next(iter(agent._projects.running())).groups.place
    await pool.stop_node("one")
    # Nor where runc has made one: in hierarchies that bound nothing here.
    assert not list(HIERARCHY.glob(f"*{name}")) and not (HIERARCHY / name.lstrip("/")).exists()


async def test_step_that_its_own_client_has_made_cannot_leave_the_group_of_its_build(pool):
    await pool.start_node(build_pids=300)
    forged = f"TRACEPARENT=00-{'0' * 32}-{'0' * 16}-00"
    script = "/busybox sed 's/^[^/]*:/group /' /proc/self/cgroup; /busybox true"
    async with Buildx(pool.gateway.address, pool.keys) as user:
        for number, parent in enumerate(("/../../escape", "escape.slice:", "/escape")):
            meta = field(2, forged) + field(10, parent)
            result = await user.buildctl(
                "build", "--progress=plain", "--no-cache", "--local=context=.",
                stdin=shell_definition(f"{script} {number}", meta),
            )  # fmt: skip
            assert result.code == 0, result.output
            groups = re.findall(r" group (/offload-builds/\S+)", result.output)
            (group,) = {group for group in groups if group.startswith(f"/{ROOT}/")}
            # A group of its own: neither the one that it named, nor one for all.
            assert re.fullmatch(rf"/{ROOT}/[0-9a-f]{{16}}/[0-9a-f]{{32}}/.*", group), group
            assert "0" * 32 not in group and OTHERS not in group


async def test_groups_of_a_node_that_was_killed_are_gone_when_it_starts_again(pool):
    folder = pool.folder / "one" / "projects" / "gone~protected" / "buildkit"
    folder.mkdir(parents=True)
    place = BuildGroups(folder, BuildLimits(processes=50)).place.lstrip("/")
    left = [HIERARCHY / name / place for name in ("memory", "cpu", "pids", "unified")]
    made = [group for group in left if (group.parents[1] / "cgroup.procs").exists()]
    for group in made:
        (group / trace_of("x") / "buildkit" / "step").mkdir(parents=True)
    await pool.start_node()
    assert made
    assert [path for path in made if path.exists()] == []


async def test_project_has_bounds_of_its_own(pool):
    await pool.start_node(build_pids=5000, project_build_limits={"def*": ["pids=77"]})
    client = await client_of(pool, "RUN sleep 1; cat /sys/fs/cgroup/pids/pids.max\n")
    await client.start()
    deadline = time.monotonic() + 20
    files: list[Path] = []
    while not files and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        files = list(
            (HIERARCHY / "pids" / ROOT).glob(f"*/{trace_of(client.assigned.build_id)}/pids.max")
        )
    assert files[0].read_text() == "77\n"
    await client.until("result")
    await client.done()


async def test_build_that_writes_more_than_it_may_is_stopped_at_its_step(pool):
    agent = await pool.start_node(build_disk=40 * MIB)
    few = "RUN head -c 20000000 /dev/zero > /first\n"
    more = "RUN for i in $(seq 100); do head -c 4000000 /dev/zero > /f$i; sleep 0.1; done\n"
    failure = (await result_of(await client_of(pool, few + more))).failure
    assert failure.process_exit_code == 137, failure
    assert "The build was stopped: its steps have written" in failure.message
    assert "a build may write 40MiB" in failure.message
    # What another build has written is not counted, nor what is in the cache.
    assert (await result_of(await client_of(pool, few + "RUN sleep 1\n"))).HasField("success")
    await wait_free(agent)


@pytest.mark.parametrize(
    "step",
    [
        # What is deleted and held open is in no directory.
        "RUN exec 3>/x; rm /x; {}; exit 5\n".format(
            "for i in $(seq 60); do head -c 4000000 /dev/zero >&3; sleep 0.1; done"
        ),
        "RUN --mount=type=cache,target=/c {}; exit 5\n".format(
            "for i in $(seq 60); do head -c 4000000 /dev/zero >/c/$i; sleep 0.1; done"
        ),
    ],
    ids=["deleted", "cache-mount"],
)
async def test_what_a_step_writes_elsewhere_counts_as_well(pool, step):
    await pool.start_node(build_disk=40 * MIB)
    failure = (await result_of(await client_of(pool, step))).failure
    assert failure.process_exit_code == 137, failure
    assert "The build was stopped: its steps have written" in failure.message


async def test_step_that_fills_the_disk_is_ended_and_others_go_on(pool, disk):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "limits", disk], check=True)
    try:
        agent = await pool.start_node(data=disk / "one")
        neighbour = await client_of(
            pool, "RUN head -c 8000000 /dev/zero > /f; sleep 6; echo fine\n"
        )
        greedy = await client_of(
            pool, "RUN for i in $(seq 100); do head -c 4000000 /dev/zero > /f$i; sleep 0.1; done\n"
        )
        beside = asyncio.ensure_future(result_of(neighbour))
        failure = (await result_of(greedy)).failure
        assert failure.process_exit_code == 137, failure
        assert "the node's disk is nearly full" in failure.message
        assert "it had written the most" in failure.message
        assert (await beside).HasField("success")
        await wait_free(agent)
        await pool.stop_node("one")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
