"""Builds reach hosts of a private network through `offload connect`, and only those."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import ALLOWED
from tests.fixtures.nameserver import NameServer, name_server
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.ociimages import MemorySource, busybox_layer
from tests.fixtures.office import PRIVATE_HOST, Office
from tests.fixtures.registry import DockerRegistry
from tests.fixtures.registrybuilds import write_registries

if TYPE_CHECKING:
    from offload_builder.node.agent import NodeAgent

POOL_POLICY = """\
pool = "eu-1"
posture = "allowlist"
contact = "#builds"
projects_may_allow = ["*.corp.example"]

[[rule]]
id = "files"
allow = ["files.example"]
ports = [80]
"""
PROJECT_POLICY = """\
[[rule]]
id = "office"
allow = ["web.corp.example", "images.corp.example"]
ports = [80, 81, 5000, 7777]
via = "connector"
"""
# Somebody outside has the names as well: they must never lead there.
NAMES = (
    f"files.example. 60 IN A {ALLOWED}",
    f"web.corp.example. 60 IN A {ALLOWED}",
    f"images.corp.example. 60 IN A {ALLOWED}",
)
START = "ADD --chmod=755 http://files.example/probe /bin/probe\n"
WEB = "web.corp.example:80"
ALLOW_WEB = ("--allow", f"{WEB}={PRIVATE_HOST}:80", "--name", "office-1")


@dataclass
class Scene:
    """A pool whose builds are behind the firewall, an office, and who works there."""

    pool: NodePool
    agent: NodeAgent
    office: Office
    names: NameServer
    token: str

    async def build(self, steps: str, project_id: str = "default", start: str = START):
        """Return the client and the result of a build."""
        assigned = await self.pool.assigned(project_id=project_id)
        client = RawClient(await self.pool.channel(assigned), assigned, start + steps)
        await client.start()
        async with asyncio.timeout(120):
            result = await client.until("result")
        await client.done()
        return client, result

    async def probe(self, *places: str, project_id: str = "default"):
        """Return what a step found at places, and what the build was told."""
        client, result = await self.build(f"RUN probe {' '.join(places)}\n", project_id)
        assert result.HasField("success"), result
        found = found_in(printed(client))
        return {place: found[place] for place in places}, told(client)

    async def served(self, *targets: str) -> None:
        """Wait until the node serves just these to its places."""
        doors = self.agent.isolation.places.doors
        async with asyncio.timeout(10):
            while True:
                have = {f"{n}:{p}" for place in doors._places.values() for n, p in place.doors}
                if have == set(targets):
                    return
                await asyncio.sleep(0.05)


def printed(client: RawClient) -> str:
    return b"".join(log.data for seen in client.seen for log in seen.progress.logs).decode()


def told(client: RawClient) -> list[str]:
    return [line for line in printed(client).splitlines() if line.startswith("egress: ")]


async def apply(pool: NodePool, text: str, project_id: str = "") -> None:
    stub = EgressServiceStub(await pool.gateway.channel(pool.keys))
    request = ApplyPolicyRequest(text=text, file="policy.toml", project_id=project_id)
    await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)


@asynccontextmanager
async def office_scene(world, monkeypatch, tmp_path, **options):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    world.files["/probe"] = egress_probe()
    async with (
        NodePool() as pool,
        name_server(*NAMES) as names,
        Office(pool.gateway.address, tmp_path / "home") as office,
    ):
        await pool.gateway.create_project("other")
        await apply(pool, POOL_POLICY)
        await apply(pool, PROJECT_POLICY, "default")
        servers = [str(names.server)]
        agent = await pool.start_node(isolation="netns", dns_servers=servers, **options)
        for port in (80, 81):
            await world.serve(office.space, PRIVATE_HOST, port)
        token = await pool.gateway.create_token("anna", identity_pb.ROLE_MEMBER, "default")
        yield Scene(pool, agent, office, names, token)


@pytest.fixture
async def scene(world, monkeypatch, tmp_path):
    async with office_scene(world, monkeypatch, tmp_path) as one:
        yield one


async def test_builds_reach_what_a_connector_serves_and_nothing_else(world, scene):
    hello = len(f"hello from {PRIVATE_HOST}")
    before, lines = await scene.probe(f"http:{WEB}/0")
    assert before[f"http:{WEB}/0"] == "refused"
    assert any(
        f"was refused {WEB} (no connector serves it now; rule office, project default)" in line
        for line in lines
    ), lines
    async with scene.office.connector(scene.token, *ALLOW_WEB, "-v") as connector:
        line = await connector.says("connected to eu-1 as office-1: ")
        assert line.endswith(f"{WEB} is reachable by builds of project default")
        await scene.served(WEB)
        # By name, in a step and in ADD; another port of the rule, and one of none.
        found, lines = await scene.probe(
            f"http:{WEB}/1", "tcp:web.corp.example:81", "tcp:web.corp.example:82"
        )
        assert list(found.values()) == [f"ok {hello}", "refused", "refused"], (found, lines)
        assert any("web.corp.example:81 (no connector serves it now;" in line for line in lines)
        assert any("was refused web.corp.example:82 (rule office" in line for line in lines)
        client, result = await scene.build(
            f"ADD http://{WEB}/file /file\nRUN cat /file && cat /etc/resolv.conf\n"
        )
        assert result.HasField("success"), (result, printed(client))
        assert f"hello from {PRIVATE_HOST}" in printed(client)
        await connector.says(f"#1 {WEB} opened")
        await connector.says(f"#1 {WEB} closed after")
        # Another project does not even get the name.
        other, lines = await scene.probe(f"tcp:{WEB}", "tcp:198.19.0.1:80", project_id="other")
        assert "ok" not in other.values()
        assert any("was refused web.corp.example (rule default-deny" in line for line in lines)
        # Nobody outside was asked for the name.
        assert not any("corp.example" in name for name, _ in scene.names.asked)
        # Stopped: refused at once, with the reason.
        assert await connector.end() == 0
    await scene.served()
    after, lines = await scene.probe(f"http:{WEB}/2")
    assert after[f"http:{WEB}/2"] == "refused"
    assert any("no connector serves it now" in line for line in lines), lines


async def test_base_images_come_through_a_connector(world, monkeypatch, tmp_path):
    host = "images.corp.example:5000"
    source = MemorySource()
    image = source.add_image([busybox_layer()])
    with DockerRegistry(tmp_path / "registry", auth={}) as registry:
        registry.push(source, "team/base", image.digest, "1")
        # The node's own cache of base images knows the registry as well, and leaves it alone.
        config = write_registries(tmp_path, host, "http = true")
        async with office_scene(world, monkeypatch, tmp_path, registry_config=config) as scene:
            port = int(registry.address.rpartition(":")[2])
            await scene.office.forward((PRIVATE_HOST, 5000), ("127.0.0.1", port))
            allow = ("--allow", f"{host}={PRIVATE_HOST}:5000", "--name", "office-1")
            line = f"FROM {host}/team/base:1\nRUN echo it-works\n"
            _, result = await scene.build("", start=line)
            assert result.HasField("failure")
            async with scene.office.connector(scene.token, *allow) as connector:
                await connector.says(f"{host} is reachable")
                await scene.served(host)
                client, result = await scene.build("", start=line)
                assert result.HasField("success"), (result, printed(client))
                assert "it-works" in printed(client)


async def test_steps_behind_the_proxy_reach_a_connector_too(scene):
    await apply(scene.pool, f"proxied = true\n{PROJECT_POLICY}", "default")
    async with scene.office.connector(scene.token, *ALLOW_WEB) as connector:
        await connector.says("is reachable")
        await scene.build("")
        await scene.served(WEB)
        client, result = await scene.build(f"RUN wget -q -O - http://{WEB}/proxied\n")
        assert result.HasField("success"), (result, printed(client))
        assert f"hello from {PRIVATE_HOST}" in printed(client)


async def test_a_large_download_arrives_whole_with_little_memory(scene):
    size = 200 << 20
    async with scene.office.connector(scene.token, *ALLOW_WEB, "-v") as connector:
        await connector.says("is reachable")
        _, result = await scene.build("")
        assert result.HasField("success"), result
        await scene.served(WEB)
        peak = before = memory()
        building = asyncio.ensure_future(scene.probe(f"http:{WEB}/bytes/{size}"))
        while not building.done():
            peak = max(peak, memory())
            await asyncio.sleep(0.05)
        found, lines = await building
        assert found[f"http:{WEB}/bytes/{size}"] == f"ok {size}", (found, lines)
        # Gateway, node and the server are all in this process.
        assert peak - before < 100 << 20
        assert memory(connector.process.pid) < 200 << 20


async def test_a_connection_that_nobody_reads_holds_up_no_other_and_takes_little(scene):
    async with scene.office.connector(scene.token, *ALLOW_WEB, "-v") as connector:
        await connector.says("is reachable")
        await scene.build("")
        await scene.served(WEB)
        before = memory()
        ask = "(printf 'GET /bytes/400000000 HTTP/1.1\\r\\n\\r\\n'; sleep 9)"
        unread = f"{ask} | nc web.corp.example 80 | sleep 9 &"
        steps = f"RUN {unread} sleep 1; probe http:{WEB}/bytes/20971520\n"
        client, result = await scene.build(steps)
        assert result.HasField("success"), (result, printed(client))
        assert found_in(printed(client))[f"http:{WEB}/bytes/20971520"] == "ok 20971520"
        # Of the other one only what fits into the windows has moved.
        cut = await connector.says("was cut after")
        moved = re.search(r"seconds, ([\d.]+)MB to the build", cut)
        assert moved and float(moved[1]) < 50, cut
        assert memory() - before < 100 << 20
        assert memory(connector.process.pid) < 200 << 20


async def test_each_direction_ends_by_itself(scene):
    got = hashlib.sha256()

    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Answers only after the build has said that it sends no more.
        while data := await reader.read(1 << 16):
            got.update(data)
        writer.write(f"digest {got.hexdigest()}\n".encode())
        await writer.drain()

    await scene.office.serve(7777, digest)
    allow = ("--allow", f"web.corp.example:7777={PRIVATE_HOST}:7777")
    async with scene.office.connector(scene.token, *allow) as connector:
        await connector.says("is reachable")
        steps = "RUN head -c 3000000 /dev/zero | nc web.corp.example 7777\n"
        client, result = await scene.build(steps)
        assert result.HasField("success"), (result, printed(client))
        assert f"digest {hashlib.sha256(bytes(3000000)).hexdigest()}" in printed(client)


async def test_a_connector_that_is_killed_ends_connections_within_seconds(scene):
    place = f"http:{WEB}/stream/60"
    async with scene.office.connector(scene.token, *ALLOW_WEB, "-v") as connector:
        await connector.says("is reachable")
        building = asyncio.ensure_future(scene.probe(place))
        await connector.says("opened")
        await asyncio.sleep(0.5)
        killed = asyncio.get_running_loop().time()
        await connector.end(signal.SIGKILL)
        found, _ = await building
        assert asyncio.get_running_loop().time() - killed < 8
        assert "reset" in found[place] or "EOF" in found[place], found
    await scene.served()


async def test_a_revoked_login_and_a_changed_policy_end_what_they_allowed(scene):
    async with scene.office.connector(scene.token, *ALLOW_WEB) as connector:
        await connector.says("is reachable")
        await scene.build("")
        await scene.served(WEB)
        listed = await scene.office.run(scene.token, "connect", "--list")
        assert re.search(rf"office-1 +anna .*{WEB}", listed), listed
        await apply(scene.pool, PROJECT_POLICY.replace("80, 81,", "81,"), "default")
        await connector.says("nothing is reachable yet by builds of project default")
        line = await connector.says(f"WARNING: {WEB} is not reachable: ")
        assert line.endswith("ask #builds")
        await scene.served()
        await apply(scene.pool, PROJECT_POLICY, "default")
        await connector.says(f"{WEB} is reachable", times=2)
        await scene.served(WEB)
        # A network that comes back.
        scene.office.cut()
        await connector.says("lost the gateway")
        await scene.served()
        scene.office.up = True
        await connector.says(f"{WEB} is reachable", times=3)
        admin = await scene.pool.gateway.admin()
        request = identity_pb.RevokeTokenRequest(token_id=scene.token.split("_")[1])
        await admin.RevokeToken(request, metadata=call_metadata(), timeout=10)
        await connector.says("ERROR: ")
        assert await asyncio.wait_for(connector.process.wait(), 10) == 4
        await scene.served()
    audit = ("audit", "--format", "json", "--action", "connector")
    audit += ("--data-dir", str(scene.pool.gateway.directory))
    out = (await asyncio.to_thread(CliRunner().invoke, main, audit)).stdout
    records = [json.loads(line) for line in out.splitlines()]
    seen = [(one["action"], one["member"], one["project_id"], one["result"]) for one in records]
    assert seen[0] == ("connector.connected", "anna", "default", "ok")
    assert ("connector.disconnected", "anna", "default", "ok") in seen


async def test_who_may_not_is_refused_with_a_sentence(scene):
    create = scene.pool.gateway.create_token
    ben = await create("ben", identity_pb.ROLE_MEMBER, "other")
    eve = await create("eve", identity_pb.ROLE_UNTRUSTED, "default")
    run = scene.office.run
    assert '"ben" may not use the project "default"' in await run(ben, "connect", *ALLOW_WEB)
    assert "an untrusted member may not run a connector" in await run(eve, "connect", *ALLOW_WEB)
    address = await run(scene.token, "connect", "--allow", "10.8.8.8:80")
    assert "write NAME:80=10.8.8.8:80" in address
    # A name that is public, and that no rule gives to connectors.
    async with scene.office.connector(
        scene.token, "--allow", f"files.example:80={PRIVATE_HOST}:80", "--name", "thief"
    ) as connector:
        await connector.says("WARNING: files.example:80 is not reachable: no rule with via")
        found, _ = await scene.probe("http:files.example:80/who")
        assert found["http:files.example:80/who"] == f"ok {len(f'hello from {ALLOWED}')}"
        cara = await create("cara", identity_pb.ROLE_CI, "default")
        taken = await run(cara, "connect", *ALLOW_WEB[:2], "--name", "thief")
        assert '"anna" runs a connector "thief" of the project "default" already' in taken


async def test_a_host_that_does_not_answer_is_told_at_the_step(scene):
    allow = ("--allow", f"{WEB}={PRIVATE_HOST}:4")
    async with scene.office.connector(scene.token, *allow, "--name", "office-1") as connector:
        await connector.says("is reachable")
        found, lines = await scene.probe(f"http:{WEB}/x")
        assert "ok" not in found[f"http:{WEB}/x"]
        told_so = 'the connector "office-1" cannot connect: connection refused'
        assert any(told_so in line for line in lines), lines
        await connector.says(f"#1 {WEB} refused: ")


def memory(pid: int | str = "self") -> int:
    """Return the bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
