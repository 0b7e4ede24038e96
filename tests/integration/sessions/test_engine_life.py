"""Engines that pause, wake, die and are kept ready; devices that only some of them have."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from offload_builder.egress.firewall.namespaces import NetworkNamespace
from offload_builder.node.sessions.dialing import PortDialer
from offload_builder.node.sessions.engine.groups import EngineGroups
from offload_builder.node.sessions.engine.host import EngineHost
from offload_builder.node.sessions.engine.loops import devices_of
from offload_core.errors import DeviceUnavailableError, NodeLostError
from tests.fixtures.cdi import HAVE, HAVE_NOT, KIND, write_specification
from tests.fixtures.sessionengines import (
    LIMITS,
    MIB,
    TOOLS,
    docker,
    engine_settings,
    import_image,
    run,
    spec,
)
from tests.fixtures.sessionnetwork import LoneNetworks

pytestmark = pytest.mark.timeout(300)
SECONDS = 60


@asynccontextmanager
async def hosting(data: Path, networks: LoneNetworks | None = None, **more):
    async with EngineHost(engine_settings(data, **more), networks or LoneNetworks()) as host:
        assert not host.why_impossible(), host.why_impossible()
        yield host


async def until(true, what: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.05)
    assert true(), what


async def test_a_paused_engine_has_no_process_and_wakes_with_what_was_in_it(tmp_path):
    networks = LoneNetworks()
    async with hosting(tmp_path / "data", networks) as host:
        engine = await host.create(spec())
        await asyncio.to_thread(import_image, engine)
        made = await asyncio.to_thread(
            docker, engine, "run", "--name", "kept", "-v", "volume:/v", "box", "/bin/busybox",
            "sh", "-c", "echo in-volume > /v/file; echo said",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        first = engine.pid

        await host.pause(engine)

        assert engine.pid == 0
        assert not Path(f"/proc/{first}").exists()
        assert not devices_of(tmp_path / "data")
        assert engine.disk_used() > 0
        assert not engine.ended.done()

        await host.wake(engine)

        assert engine.pid != 0
        logs = await asyncio.to_thread(docker, engine, "logs", "kept")
        volume = await asyncio.to_thread(run, engine, "-v", "volume:/v", script="cat /v/file")
        assert (logs.stdout, volume.stdout) == ("said\n", "in-volume\n")
        assert list(networks.attached) == [engine.engine_id]


async def test_ports_are_those_of_the_engines_own_network_whatever_its_process_is(tmp_path):
    networks = LoneNetworks()
    async with hosting(tmp_path / "data", networks) as host:
        engine = await host.create(spec())
        dialer = PortDialer()
        server = await asyncio.to_thread(_listening, Path(f"/proc/{engine.pid}/ns/net"))
        with server, contextlib.closing(dialer):
            await host.pause(engine)
            assert engine.pid == 0
            with await dialer.tcp(engine, "", server.getsockname()[1]):
                pass
        await host.remove(engine.engine_id)
        with pytest.raises(NodeLostError):
            await dialer.tcp(engine, "", 80)


def _listening(namespace: Path) -> socket.socket:
    entered = NetworkNamespace("test", namespace)
    try:
        return asyncio.run(entered.listen_tcp("127.0.0.1"))
    finally:
        entered.close()


async def test_what_is_frozen_in_an_engine_ends_with_it(tmp_path):
    freeze = (
        "mkdir -p /s; busybox mount -t cgroup -o freezer freezer /s;"
        "mkdir -p /s/x && echo 1 > /s/x/cgroup.procs && echo FROZEN > /s/x/freezer.state;"
        "busybox sleep 1000"
    )
    async with hosting(tmp_path / "data") as host:
        engine = await host.create(spec())
        await asyncio.to_thread(import_image, engine)
        for words in (("run", "-d", "--name", "held", "box", "sleep", "1000"), ("pause", "held")):
            done = await asyncio.to_thread(docker, engine, *words)
            assert done.returncode == 0, done.stderr

        first, own = engine.pid, ("--privileged", "--pid=host", "--cgroupns=host")
        script = ("box", "/bin/busybox", "sh", "-c", freeze)
        done = await asyncio.to_thread(docker, engine, "run", "-d", *own, *script)
        assert done.returncode == 0, done.stderr
        if not EngineGroups(tmp_path / "data", engine.engine_id).unified:
            await until(lambda: is_frozen(first), "the first process is frozen")

        await host.remove(engine.engine_id)

        assert not Path(f"/proc/{first}").exists()
        assert not devices_of(tmp_path / "data")
        assert not list((tmp_path / "data").iterdir())


def is_frozen(pid: int) -> bool:
    groups = dict(line.split(":")[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().split())
    state = Path("/sys/fs/cgroup/freezer", groups["freezer"][1:], "freezer.state")
    return state.read_text() == "FROZEN\n"


async def test_a_removed_engine_leaves_nothing_and_is_removed_again_without_harm(tmp_path):
    networks = LoneNetworks()
    async with hosting(tmp_path / "data", networks) as host:
        engine = await host.create(spec())
        pid = engine.pid

        await host.remove(engine.engine_id)
        await host.remove(engine.engine_id)

        assert not list((tmp_path / "data").iterdir())
        assert not networks.attached
        assert not Path(f"/proc/{pid}").exists()
        assert not engine.socket.exists()
        with pytest.raises(NodeLostError):
            await host.wake(engine)


async def test_the_end_of_dockerd_is_noticed_and_everything_of_it_ends(tmp_path):
    async with hosting(tmp_path / "data") as host:
        engine = await host.create(spec())
        children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
        first = engine.pid

        os.kill(int(children[0]), signal.SIGKILL)

        async with asyncio.timeout(SECONDS):
            assert "dockerd ended" in await asyncio.shield(engine.ended)
        assert not Path(f"/proc/{first}").exists()
        assert engine.pid == 0


async def test_an_engine_that_is_ready_is_taken_bounded_and_replaced(tmp_path):
    more = {"ready": 1, "ready_limits": LIMITS}
    async with hosting(tmp_path / "data", **more) as host:
        await until(lambda: host.ready == 1, "an engine is ready")
        (ready,) = [path.name for path in (tmp_path / "data").iterdir()]
        wanted = replace(LIMITS, memory_bytes=300 * MIB, pids=200)

        engine = await host.create(spec(wanted))

        assert engine.engine_id == ready
        await asyncio.to_thread(import_image, engine)
        done = await asyncio.to_thread(
            run, engine, script="busybox dd if=/dev/zero of=/dev/null bs=400M count=1"
        )
        assert done.returncode == 137, done
        await until(lambda: host.ready == 1, "another one is ready")
    assert not list((tmp_path / "data").iterdir())


async def test_an_engine_that_dies_while_it_is_ready_is_replaced(tmp_path):
    async with hosting(tmp_path / "data", ready=1, ready_limits=LIMITS) as host:
        await until(lambda: host.ready == 1, "an engine is ready")
        (dying,) = (tmp_path / "data").iterdir()
        os.kill(json.loads((dying / "engine.json").read_text())["pid"], signal.SIGKILL)

        await until(lambda: not dying.exists(), "it is removed")
        await until(lambda: host.ready == 1, "another one is ready")
        engine = await host.create(spec())

        assert engine.engine_id != dying.name
        assert engine.pid


async def test_a_dockerd_that_does_not_start_is_told_with_its_last_lines(tmp_path):
    async with hosting(tmp_path / "data", options={"storage-driver": "no-such-driver"}) as host:
        with pytest.raises(NodeLostError, match="no-such-driver"):
            await host.create(spec())

        assert not list((tmp_path / "data").iterdir())


async def test_an_engine_that_takes_too_long_is_given_up_and_removed(tmp_path):
    async with hosting(tmp_path / "data", start_seconds=0.2) as host:
        with pytest.raises(NodeLostError, match=r"within 0\.2 s"):
            await host.create(spec())

        assert not list((tmp_path / "data").iterdir())


async def test_a_machine_without_a_docker_engine_says_so(tmp_path):
    settings = engine_settings(tmp_path / "data", dockerd=TOOLS / "buildctl")
    async with EngineHost(settings, LoneNetworks()) as host:
        assert "dockerd" in host.why_impossible()
        with pytest.raises(NodeLostError):
            await host.create(spec())


async def test_devices_are_only_in_the_engine_that_has_them(tmp_path):
    write_specification(tmp_path / "cdi", "0", "1")
    (tmp_path / "cdi" / "broken.json").write_text("{")
    async with hosting(tmp_path / "data", cdi_spec_dirs=(tmp_path / "cdi",)) as host:
        having = await host.create(spec(devices=[f"{KIND}=0"]))
        lacking = await host.create(spec())
        for engine in (having, lacking):
            await asyncio.to_thread(import_image, engine)
        shell = "test() { busybox test $@; }; "

        async def ask(engine, name: str, script: str):
            arguments = ("--device", name) if name else ()
            return await asyncio.to_thread(run, engine, *arguments, script=shell + script)

        chosen = await ask(having, f"{KIND}=0", HAVE)
        every = await ask(having, f"{KIND}=all", HAVE)
        unasked = await ask(having, "", HAVE_NOT)
        other = await ask(having, f"{KIND}=1", HAVE)
        none = await ask(lacking, f"{KIND}=0", HAVE)
        privileged = await asyncio.to_thread(
            run, lacking, "--privileged", script="ls /dev/loop-control /dev/nvidia0"
        )

        assert chosen.stdout == "has-device\n", chosen.stderr
        assert every.stdout == "has-device\n", every.stderr
        assert unasked.stdout == "has-no-device\n", unasked.stderr
        assert other.returncode == 125
        assert none.returncode == 125
        assert privileged.returncode != 0
        assert not privileged.stdout


async def test_a_device_that_the_node_lacks_is_refused(tmp_path):
    async with hosting(tmp_path / "data", cdi_spec_dirs=(tmp_path / "cdi",)) as host:
        with pytest.raises(DeviceUnavailableError):
            await host.create(spec(devices=["vendor.com/kind=none"]))
