"""What of the firewall stays, and what does not, when things end or are removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload_builder.egress.firewall import links, router
from offload_builder.egress.firewall.nft import open_nft
from offload_core.errors import InternalError
from tests.fixtures.egressworld import (
    ALLOWED,
    ALLOWED6,
    DENIED,
    HOSTS,
    USUAL,
    attempt,
    inside,
    watched_firewall,
)

REPOSITORY = Path(__file__).resolve().parents[3]
AGENT = """
import asyncio, sys
from pathlib import Path
from offload_builder.egress.firewall.lifecycle import EgressFirewall
from tests.fixtures.egressworld import USUAL, open_policy

async def main():
    async with EgressFirewall(Path(sys.argv[1])) as firewall:
        async with firewall.attach("one", USUAL) as one, firewall.attach("two", open_policy()):
            print("ready", one.namespace, file=sys.stderr, flush=True)
            while True:
                await firewall.apply("two", open_policy())
                async with firewall.attach("three", USUAL):
                    await firewall.apply("two", USUAL)

asyncio.run(main())
"""


def rules(text: str = "list tables") -> str:
    nft = open_nft()
    try:
        return nft.apply(text)
    finally:
        nft.close()


def agent(data: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", AGENT, data], cwd=REPOSITORY, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


async def left(world) -> tuple[set[str], str]:
    """Return the devices and tables of the machine, once namespaces that ended are gone."""
    devices: set[str] = set()
    for _ in range(100):
        devices = await world.machine.run(links.device_names)
        if not any(name.startswith("ob") for name in devices):
            break
        await asyncio.sleep(0.05)
    return devices, await world.machine.run(rules)


async def test_nothing_is_left_after_an_orderly_end(world, tmp_path):
    before = await left(world)
    async with watched_firewall(world, tmp_path) as watched:
        async with watched.firewall.attach("one", USUAL):
            assert any(n.startswith("ob") for n in await world.machine.run(links.device_names))
        listed = await watched.firewall.router.change("list ruleset")
        assert "p0" not in listed
    assert await left(world) == before


async def test_after_a_kill_nothing_passes_and_the_next_start_repairs_all(world, tmp_path):
    before = await left(world)
    chance = random.Random(8)
    for number in range(13):
        process = await world.machine.run(agent, tmp_path)
        try:
            if number == 0:
                words = (await asyncio.to_thread(process.stderr.readline)).split()
                async with inside(Path(words[1])) as run:
                    assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    for host in set(HOSTS) - {ALLOWED, ALLOWED6}:
                        found = await run(attempt, host, 80, 0.1)
                        assert not found.startswith("hello"), host
                    await left(world)
                    for host in HOSTS:
                        found = await run(attempt, host, 80, 0.1)
                        assert not found.startswith("hello"), host
                    assert not {ip for ip, _ in world.requests} - {ALLOWED, ALLOWED6}
            else:
                # From before the namespace until in the middle of attaching and replacing rules.
                # Half of them are counted from there: how long a start takes is not known.
                if number % 2:
                    await asyncio.to_thread(process.stderr.readline)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, chance.uniform(0.0, 0.6))
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
    async with (
        watched_firewall(world, tmp_path) as watched,
        watched.firewall.attach("one", USUAL) as network,
        inside(network.namespace) as run,
    ):
        for host in (ALLOWED, ALLOWED6):
            assert await run(attempt, host) == f"hello from {host}"
        assert await run(attempt, DENIED) == "errno 111"
    assert await left(world) == before


async def test_two_nodes_of_a_machine_do_not_meet(world, tmp_path):
    async with (
        watched_firewall(world, tmp_path / "a") as first,
        watched_firewall(world, tmp_path / "b") as second,
        first.firewall.attach("one", USUAL) as one,
        inside(one.namespace) as run,
    ):
        async with second.firewall.attach("one", USUAL):
            assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
            for address in await second.firewall.router.inside.run(links.local_addresses):
                found = await run(attempt, str(address), 53, 0.5)
                assert not found.startswith("hello"), address
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"


async def test_rules_that_others_removed_from_the_machine_come_back(world, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "REPAIR_SECONDS", 0.2)
    async with (
        watched_firewall(world, tmp_path) as watched,
        watched.firewall.attach("one", USUAL) as network,
        inside(network.namespace) as run,
    ):
        await world.machine.run(rules, "flush ruleset")
        found = ""
        for _ in range(20):
            found = await run(attempt, ALLOWED, 80, 0.5)
            if found == f"hello from {ALLOWED}":
                break
        assert found == f"hello from {ALLOWED}"


async def test_a_docker_that_drops_what_is_forwarded_is_lived_with(world, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "REPAIR_SECONDS", 0.2)

    def docker(*arguments: str) -> str:
        done = subprocess.run(
            ["iptables", "-w", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    async def docker_starts() -> None:
        await world.machine.run(docker, "-N", "DOCKER-USER")
        await world.machine.run(docker, "-I", "FORWARD", "-j", "DOCKER-USER")
        await world.machine.run(docker, "-P", "FORWARD", "DROP")

    async with (
        watched_firewall(world, tmp_path) as watched,
        watched.firewall.attach("one", USUAL) as network,
        inside(network.namespace) as run,
    ):
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
        await docker_starts()
        found = ""
        for _ in range(20):
            found = await run(attempt, ALLOWED, 80, 0.5)
            if found == f"hello from {ALLOWED}":
                break
        assert found == f"hello from {ALLOWED}"
        assert "offload" in await world.machine.run(docker, "-S", "DOCKER-USER")
    assert "offload" not in await world.machine.run(docker, "-S", "DOCKER-USER")
    assert "DROP" in await world.machine.run(docker, "-S", "FORWARD")


async def test_what_docker_was_told_is_taken_back_after_a_kill(world, tmp_path):
    def iptables(*arguments: str) -> str:
        done = subprocess.run(
            ["iptables", "-w", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    await world.machine.run(iptables, "-P", "FORWARD", "DROP")
    for _ in range(2):
        process = await world.machine.run(agent, tmp_path)
        assert "ready" in await asyncio.to_thread(process.stderr.readline)
        process.kill()
        process.wait()
        process.stderr.close()
    assert "offload" in await world.machine.run(iptables, "-S", "FORWARD")
    async with watched_firewall(world, tmp_path):
        told = await world.machine.run(iptables, "-S", "FORWARD")
        assert told.count("offload") == 2
    assert "offload" not in await world.machine.run(iptables, "-S", "FORWARD")
    assert "offload" not in await world.machine.run(rules)


async def test_a_batch_that_is_killed_halfway_holds_as_a_whole_or_not_at_all(world):
    elements = ", ".join(f"10.{n >> 8 & 255}.{n & 255}.1" for n in range(20_000))
    old = "table inet t {\n set s {\n type ipv4_addr\n elements = { 10.0.0.1 }\n }\n}\n"
    text = f"flush set inet t s\nadd element inet t s {{ {elements} }}\n"
    chance = random.Random(8)

    def killed(seconds: float) -> int:
        subprocess.run(["nft", "-f", "-"], input=f"flush ruleset\n{old}", text=True, check=True)
        with subprocess.Popen(["nft", "-f", "-"], stdin=subprocess.PIPE, text=True) as process:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(text, timeout=seconds)
            process.kill()
        found = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True)
        return len(re.findall(r"\b10\.\d+\.\d+\.1\b", found.stdout))

    found = {await world.world.run(killed, chance.uniform(0.01, 0.4)) for _ in range(8)}
    assert found <= {1, 20_000}


async def test_a_batch_with_one_mistake_changes_nothing(watched):
    change = watched.firewall.router.change
    async with watched.firewall.attach("one", USUAL) as network, inside(network.namespace) as run:
        before = await change("list ruleset")
        for text in (
            "flush chain inet offload_build forward\nadd rule inet offload_build nowhere accept",
            "delete table inet offload_build\nadd element inet offload_build hard4 { x }",
        ):
            with pytest.raises(InternalError):
                await change(text)
        assert (await change("list ruleset")) == before
        assert await run(attempt, DENIED) == "errno 111"


async def test_an_agent_that_starts_before_the_network_is_closed_until_it_is_there(world, tmp_path):
    await world.machine.run(links.run_ip, ["route del default", "route del ::/0"])
    async with (
        watched_firewall(world, tmp_path) as watched,
        watched.firewall.attach("one", USUAL) as network,
        inside(network.namespace) as run,
    ):
        assert not (await run(attempt, ALLOWED, 80, 0.5)).startswith("hello")
        await world.machine.run(links.run_ip, ["route add default via 198.51.100.1 dev eth0"])
        assert await run(attempt, ALLOWED) == f"hello from {ALLOWED}"
        for host in set(HOSTS) - {ALLOWED}:
            assert not (await run(attempt, host, 80, 0.5)).startswith("hello"), host
