"""What a step is confined by: filters, capabilities, masks, and what of the node it can see."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit import BkSession, SessionProviders, SolveResult, SolveSpec
from offload_builder.buildkit.h2.client import GrpcClient
from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.runcwrapper import STEP_OOM_SCORE
from offload_builder.node.privileges import KEPT
from offload_core.errors import ConfigError
from offload_proto.buildkit import control_pb2 as control
from tests.fixtures.buildkit import BASE, dockerfile_source, running_daemon
from tests.fixtures.contexts import make_context
from tests.fixtures.node import NodePool, RawClient, wait_free
from tests.fixtures.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.buildkit import BuildkitDaemon

DOCKER_DEFAULT = 0x00000000A80425FB
NET_RAW = 1 << 13
UNIMPLEMENTED = 12
GIVE_UP = (
    "import os, sys; from pathlib import Path;"
    "from offload_builder.node.privileges import give_up_privileges;"
    "give_up_privileges(Path(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


async def output_of(daemon: BuildkitDaemon, steps: str, rights: Sequence[str] = ()) -> str:
    source = dockerfile_source(BASE + steps)
    spec = SolveSpec({"filename": "Dockerfile"}, entitlements=rights)
    async with BkSession(daemon.client, "k", SessionProviders(source=source)) as session:
        solving = asyncio.create_task(daemon.client.solve(spec, session))
        text = b""
        async with asyncio.timeout(60):
            async for batch in daemon.client.status(spec.ref):
                text += b"".join(log.data for log in batch.logs)
            result = await solving
        assert isinstance(result, SolveResult), (result, text)
        return text.decode()


def status_of(output: str) -> dict[str, str]:
    lines = (line.partition(":") for line in output.splitlines())
    return {name: value.strip() for name, _, value in lines}


async def test_step_has_the_seccomp_filter_and_the_usual_capabilities_but_raw_sockets() -> None:
    async with running_daemon() as daemon:
        found = status_of(await output_of(daemon, "RUN busybox cat /proc/self/status\n"))
        assert found["Seccomp"] == "2"
        # As docker does: sudo in a Dockerfile has to work.
        assert found["NoNewPrivs"] == "0"
        for kind in ("CapBnd", "CapPrm", "CapEff"):
            assert int(found[kind], 16) == DOCKER_DEFAULT & ~NET_RAW, kind
        assert found["CapInh"] == found["CapAmb"] == "0000000000000000"


async def test_step_sees_no_files_of_the_kernel_that_tell_or_change_something() -> None:
    steps = (
        "RUN for f in kcore keys timer_list; do "
        "busybox echo masked-$f $(busybox head -c 1 /proc/$f 2>/dev/null | busybox wc -c); done; "
        "for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/kernel/uevent_helper "
        "/sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max; do "
        "[ ! -e $f ] || { echo 9 > $f; } 2>/dev/null && [ -e $f ] && echo changed $f; done; "
        "busybox ls -A /sys/firmware /proc/scsi 2>/dev/null | busybox wc -l; "
        "busybox mount -t tmpfs none /mnt 2>/dev/null && echo mounted; busybox echo the-end\n"
    )
    async with running_daemon() as daemon:
        output = await output_of(daemon, steps)
        assert "the-end" in output
        assert output.count("masked-") == 3
        assert all(f"masked-{name} 0" in output for name in ("kcore", "keys", "timer_list"))
        assert "changed" not in output and "mounted" not in output


async def test_step_has_its_own_namespaces_and_is_ended_before_the_node_is() -> None:
    kinds = ("pid", "ipc", "uts", "mnt")
    steps = (
        f"RUN for n in {' '.join(kinds)}; do busybox readlink /proc/self/ns/$n; done; "
        "echo score $(busybox cat /proc/self/oom_score_adj); "
        "echo first $(busybox tr '\\0' ' ' < /proc/1/cmdline)\n"
    )
    async with running_daemon() as daemon:
        output = await output_of(daemon, steps)
        for kind in kinds:
            own = os.fspath(Path(f"/proc/self/ns/{kind}").readlink())
            assert f"{kind}:[" in output and own not in output, kind
        assert f"score {STEP_OOM_SCORE}" in output
        # The first process that it can see is its own.
        assert "first /bin/busybox sh -c" in output


async def test_insecure_step_cannot_have_what_the_agent_has_given_up(tmp_path) -> None:
    prefix = (sys.executable, "-c", GIVE_UP, str(tmp_path / "data"))
    rights = ["security.insecure"]
    async with running_daemon(command_prefix=prefix, entitlements=rights) as daemon:
        steps = (
            "RUN --security=insecure busybox cat /proc/self/status; busybox mkdir /m; "
            "busybox mount -t tmpfs none /m && echo has-mounted; "
            "busybox date -s 2001-01-01 2>&1; echo the-end\n"
        )
        output = await output_of(daemon, steps, rights)
        allowed = sum(1 << number for number in KEPT.values())
        assert not int(status_of(output)["CapBnd"], 16) & ~allowed
        assert "has-mounted" in output and "the-end" in output
        assert "Operation not permitted" in output
        # The usual steps are as they were, and so are their files.
        output = await output_of(
            daemon, "RUN busybox cat /proc/self/status; umask; ulimit -Hc; echo x > /f; "
            "busybox stat -c mode-%a /f\n"
        )  # fmt: skip
        found = status_of(output)
        assert int(found["CapEff"], 16) == DOCKER_DEFAULT & ~NET_RAW
        assert "0022" in output and "mode-644" in output and "unlimited" in output


def test_node_and_its_buildkit_run_without_what_they_do_not_need(tmp_path) -> None:
    allowed = sum(1 << number for number in KEPT.values())
    data = tmp_path / "data"
    data.mkdir()
    with Pool(1, data=data) as pool:
        context = make_context(tmp_path / "c", "RUN cat /proc/self/oom_score_adj && sleep 1\n")
        result = pool.member().build(context)
        assert result.returncode == 0, result.stderr
        node = pool.node_pid("node-1")
        children = Path(f"/proc/{node}/task/{node}/children").read_text().split()
        assert children
        for pid in (node, *children):
            found = status_of(Path(f"/proc/{pid}/status").read_text())
            assert not int(found["CapBnd"], 16) & ~allowed
            assert not int(found["CapEff"], 16) & ~allowed
        assert (data / "node-1").stat().st_mode & 0o777 == 0o700


async def test_profile_that_this_kernel_does_not_have_stops_the_node() -> None:
    async with NodePool() as pool:
        with pytest.raises(ConfigError, match=r"docker-default.*AppArmor"):
            await pool.start_node(apparmor_profile="docker-default")


async def test_socket_in_each_step_serves_no_control_api() -> None:
    async with running_daemon() as daemon:
        output = await output_of(
            daemon, "RUN busybox find / -xdev -type s 2>/dev/null; busybox find /dev -type s; "
            "echo the-end\n"
        )  # fmt: skip
        assert "the-end" in output
        sockets = {line for line in output.splitlines() if line.startswith("/")}
        assert sockets <= {"/dev/otel-grpc.sock"}, sockets
        client = GrpcClient(daemon.socket_path.with_name("otel.sock"))
        try:
            with pytest.raises(GrpcError) as caught:
                await client.unary(
                    "/moby.buildkit.v1.Control/Info", control.InfoRequest().SerializeToString()
                )
            assert caught.value.code == UNIMPLEMENTED
        finally:
            await client.close()


async def test_step_finds_neither_its_builds_capability_nor_files_of_the_node() -> None:
    steps = (
        "RUN cat /proc/*/environ /proc/*/cmdline /proc/self/mountinfo /etc/hosts /etc/resolv.conf "
        "| tr '\\0' '\\n'; env; ls -a / /run /tmp /dev; "
        "ls /proc/1/root/; sleep 1; echo the-end\n"
    )
    async with NodePool() as pool:
        agent = await pool.start_node()
        assigned = await pool.assigned()
        client = RawClient(await pool.channel(assigned), assigned, steps)
        await client.start()
        await client.until_text(b"nameserver")
        job = agent.slots.builds[assigned.build_id].job
        assert job is not None
        capability = job.cache.capability
        await client.until("result")
        await client.done()
        text = b"".join(log.data for seen in client.seen for log in seen.progress.logs).decode()
        assert "the-end" in text and capability
        assert capability not in text
        # The names of directories are told by the kernel; nothing in them can be reached.
        assert "bk.sock" not in text and "identity" not in text and "OFFLOAD" not in text
        await wait_free(agent)
