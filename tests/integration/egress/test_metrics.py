"""Counters of nodes and gateway, and which node has which policy in force."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

from tests.fixtures.egressworld import DENIED
from tests.fixtures.node import NodePool
from tests.integration.egress.test_reports import POLICY, START, build, firewalled

FLOOD = 2000


async def scraped(address: str, path: str = "/metrics", method: str = "GET") -> tuple[str, str]:
    """Return the first line of the answer, and its body."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        async with asyncio.timeout(20):
            data = (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    return data.partition("\r\n")[0], data.partition("\r\n\r\n")[2]


def values(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def command(pool: NodePool, *arguments: str) -> tuple[str, str]:
    """Run `offload-builder policy` beside the gateway; return standard output and error."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("offload-builder")), "policy", *arguments,
        "--data-dir", str(pool.gateway.directory),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


async def test_a_flood_is_counted_in_full_and_stays_counted(world, monkeypatch):
    async with firewalled(world, monkeypatch, metrics_address="127.0.0.1:0") as pool:
        address = pool._running["one"][0].metrics_port.address
        before = values((await scraped(address))[1])
        assert before['offload_egress_policy_version{scope="pool"}'] == 1
        places = " ".join(f"tcp:{DENIED}:{port}" for port in range(2000, 2000 + FLOOD))
        steps = f"{START}RUN probe {places} tcp:files.example:80 tcp:evil.example:80\n"
        _, result = await build(pool, steps)
        assert result.HasField("success"), result
        line, text = await scraped(address)
        assert line == "HTTP/1.1 200 OK"
        found = values(text)
        default = 'offload_egress_refused_total{project="default",stage="default"}'
        assert found[default] == FLOOD
        assert found['offload_egress_allowed_total{project="default"}'] >= 2
        assert found['offload_egress_names_refused_total{project="default"}'] >= 1
        assert found["offload_buildkit_daemons"] == 1
        assert found["offload_egress_in_force"] == 1
        assert "evil" not in text
        assert DENIED not in text
        # What a BuildKit that has stopped had counted is not lost.
        agent = pool._running["one"][0].agent
        await agent.isolation.counts.closing("default")
        assert values((await scraped(address))[1])[default] == FLOOD
        for wrong, status in ((("/", "GET"), "404"), (("/metrics", "POST"), "405")):
            assert status in (await scraped(address, *wrong))[0]
        assert await scraped(address, method="HEAD") == ("HTTP/1.1 200 OK", "")


async def test_nothing_listens_unless_it_is_wished(world, monkeypatch):
    async with firewalled(world, monkeypatch) as pool:
        assert pool._running["one"][0].metrics_port.address == ""
        assert pool.gateway.gateway.metrics_port.address == ""


async def test_it_is_said_which_node_has_a_policy_and_which_has_not(world, monkeypatch, tmp_path):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    file = tmp_path / "policy.toml"
    await asyncio.to_thread(file.write_text, POLICY)
    async with NodePool(metrics_address="127.0.0.1:0") as pool:
        assert "No node is attached" in (await command(pool, "apply", str(file)))[0]
        await asyncio.to_thread(file.write_text, POLICY.replace("#builds", "#net"))
        await pool.start_node("one", isolation="netns")
        out, err = await command(pool, "apply", str(file))
        assert ("In force at 1 of 1 nodes" in out, err) == (True, "")
        await command(pool, "rollback", "0")
        # It cannot enforce what comes.
        await pool.start_node("two", isolation="none")
        async with asyncio.timeout(20):
            while "two" not in (await command(pool, "nodes"))[0]:
                await asyncio.sleep(0.1)
        out, err = await command(pool, "apply", str(file), "--wait", "3s")
        assert "Version 4 holds\nIn force at 1 of 2 nodes\n" in out
        assert err == (
            "Not at two: the node cannot enforce the pool's egress policy (isolation is none)\n"
        )
        out, _ = await command(pool, "apply", str(file), "--wait", "0s", "--format", "json")
        told = {item["node"]: item["in_force"] for item in json.loads(out)["nodes"]}
        assert told == {"one": True, "two": False}
        rows = (await command(pool, "nodes"))[0].splitlines()
        assert re.fullmatch(r"one +4 +-", rows[1])
        assert re.match(r"two +0 +- +the node cannot enforce", rows[2])
        listed = (await command(pool, "versions"))[0].splitlines()
        assert [row.rpartition("  ")[2].strip() for row in listed[1:3]] == ["1 of 2", "0 of 2"]
        found = values((await scraped(pool.gateway.gateway.metrics_port.address))[1])
        assert found["offload_egress_nodes_behind"] == 1
        assert found['offload_nodes{state="ready"}'] == 2
        assert found['offload_egress_policy_version{scope="pool"}'] == 4
        await pool.gateway.stop()
        assert (await command(pool, "nodes"))[1] == ""
