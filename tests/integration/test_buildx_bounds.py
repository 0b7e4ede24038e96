"""The bounds of a node hold for clients that send their own steps."""

from __future__ import annotations

from tests.fixtures.buildx import Buildx, Finished
from tests.fixtures.llb import shell_definition
from tests.fixtures.node import NodePool

HUNGRY = (
    "/busybox head -c 200000000 /dev/zero | /busybox tail -c 200000000 > /dev/null"
    " && echo has-got-$((1 + 1))"
)
BUSY = "/busybox cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2> /dev/null; true"


async def build_own(user: Buildx, script: str) -> Finished:
    """Run a step that no frontend has made."""
    return await user.buildctl(
        "build", "--progress=plain", "--no-cache", "--local=context=.",
        stdin=shell_definition(script),
    )  # fmt: skip


async def test_a_step_of_its_own_client_gets_no_more_memory_than_the_node_gives() -> None:
    async with NodePool() as pool:
        await pool.start_node("one", step_memory_max=64 << 20, step_cpus_max=0.5)
        async with Buildx(pool.gateway.address, pool.keys) as user:
            result = await build_own(user, HUNGRY)
            assert result.code != 0, result.output
            assert "has-got-2" not in result.output
            # One that is modest works, and the bound of processors is its own.
            result = await build_own(user, BUSY)
            assert result.code == 0, result.output
            assert "50000" in result.output
            await pool.stop_node("one")
            await pool.start_node("two")
            result = await build_own(user, HUNGRY)
            assert result.code == 0, result.output
            assert "has-got-2" in result.output
