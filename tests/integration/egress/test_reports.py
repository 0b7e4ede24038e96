"""What builds are told of refusals, at the step that it was, and what their record keeps."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from offload_client.cli.inspection import StepList, as_json
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.buildx import Buildx
from tests.fixtures.egressprobe import egress_probe
from tests.fixtures.egressworld import ALLOWED, DENIED
from tests.fixtures.nameserver import name_server
from tests.fixtures.node import NodePool, RawClient

POLICY = """\
pool = "eu-1"
posture = "allowlist"
contact = "#builds"

[[rule]]
id = "files"
allow = ["files.example"]
ports = [80]
"""
NAMES = (
    f"files.example. 60 IN A {ALLOWED}",
    f"evil.example. 60 IN A {DENIED}",
    f"new.example. 60 IN A {ALLOWED}",
)
START = "ADD --chmod=755 http://files.example/probe /bin/probe\n"
SENTENCE = (
    "was refused {} (rule default-deny, pool eu-1); ask #builds or see offload policy explain"
)


@asynccontextmanager
async def firewalled(world, monkeypatch, policy=POLICY, **options):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    world.files["/probe"] = egress_probe()
    async with NodePool() as pool, name_server(*NAMES) as names:
        await pool.start_node(isolation="netns", dns_servers=[str(names.server)], **options)
        stub = EgressServiceStub(await pool.gateway.channel(await pool.gateway.login("")))
        request = ApplyPolicyRequest(text=policy, file="policy.toml")
        await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
        policies = pool._running["one"][0].policies
        async with asyncio.timeout(20):
            await policies.wait_for(lambda held: held.versions() == {"": 1})
        yield pool


@pytest.fixture
async def pool(world, monkeypatch):
    async with firewalled(world, monkeypatch) as one:
        yield one


async def build(pool: NodePool, steps: str):
    """Return the client and the result of a build."""
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    async with asyncio.timeout(60):
        result = await client.until("result")
    await client.done()
    return client, result


def lines(client: RawClient) -> dict[str, list[str]]:
    """Return what the firewall said, by the name of the step."""
    names = {v.digest: v.name for seen in client.seen for v in seen.progress.vertices}
    found: dict[str, list[str]] = {}
    for seen in client.seen:
        for log in seen.progress.logs:
            if (line := log.data.decode().strip()).startswith("egress: "):
                found.setdefault(names[log.vertex], []).append(line)
    return found


async def record(pool: NodePool, build_id: str) -> dict:
    """Return what `offload inspect --format json` shows of the network."""
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    steps = StepList()
    request = builds_pb.LogsRequest(build_id=build_id, follow=True)
    async for reply in stub.Logs(request, metadata=call_metadata(), timeout=20):
        for batch in reply.batches:
            steps.take(batch)
    return as_json(await pool.build(build_id), steps)["network"]


async def test_a_step_that_fails_is_told_why_and_the_record_keeps_it(pool):
    places = f"tcp:files.example:80 tcp:evil.example:443 tcp:{DENIED}:80"
    client, result = await build(pool, f"{START}RUN probe {places} && exit 7\n")
    told = lines(client)
    ((name, said),) = told.items()
    assert "RUN probe" in name
    number = name.partition("]")[0].split()[-1].lstrip("[")
    for target in ("evil.example", f"{DENIED}:80"):
        assert f"egress: RUN step {number} {SENTENCE.format(target)}" in said
    assert SENTENCE.format("evil.example") in result.failure.message
    kept = await record(pool, client.assigned.build_id)
    refused = {(item["host"], item["address"], item["port"]) for item in kept["refused"]}
    assert ("evil.example", None, None) in refused
    assert (None, DENIED, 80) in refused
    assert {item["step"] for item in kept["refused"]} == {name}
    (reached,) = [item for item in kept["reached"] if item["step"] == name]
    assert (reached["host"], reached["port"], reached["rule"]) == ("files.example", 80, "files")


async def test_it_is_told_while_the_step_still_runs(pool):
    assigned = await pool.assigned()
    steps = f"{START}RUN probe tcp:{DENIED}:80 && sleep 4\n"
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    async with asyncio.timeout(60):
        await client.until_text(b" refused\n")
        begun = asyncio.get_running_loop().time()
        if not lines(client):
            await client.until_text(b"egress: RUN step")
        taken = asyncio.get_running_loop().time() - begun
        result = await client.until("result")
    await client.done()
    assert result.HasField("success"), result
    assert taken < 2


async def test_parallel_steps_are_told_apart(pool):
    stages = "".join(
        f"FROM base AS s{n}\nRUN probe tcp:{DENIED}:{7000 + n} && sleep 1 && echo {n} > /r{n}\n"
        for n in range(4)
    )
    copies = "".join(f"COPY --from=s{n} /r{n} /\n" for n in range(4))
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned)
    base = client.dockerfile.replace("FROM scratch", "FROM scratch AS base", 1)
    client.dockerfile = f"{base}{START}{stages}FROM scratch\n{copies}"
    await client.start()
    async with asyncio.timeout(60):
        result = await client.until("result")
    await client.done()
    assert result.HasField("success"), result
    told = lines(client)
    assert len(told) == 4
    for name, said in told.items():
        number = name.partition("]")[0].partition("[s")[2][0]
        assert [line for line in said if f"{DENIED}:{7000 + int(number)} " in line] == said


async def test_stock_buildx_shows_it_below_the_step(pool):
    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(f"{START}RUN probe tcp:evil.example:443 tcp:{DENIED}:80\nRUN exit 3\n")
        result = await user.build()
        assert result.code != 0
        (step,) = [
            line.partition(" ")[0] for line in result.output.splitlines() if "] RUN probe" in line
        ][:1]
        for target in ("evil.example", f"{DENIED}:80"):
            (line,) = [one for one in result.output.splitlines() if f"refused {target} (" in one]
            assert line.startswith(f"{step} ")
            assert SENTENCE.format(target) in line


async def test_stock_buildx_is_told_of_the_step_that_fails_at_once(pool):
    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(f"{START}RUN probe tcp:{DENIED}:80 && exit 3\n")
        result = await user.build()
        assert result.code != 0
        assert SENTENCE.format(f"{DENIED}:80") in result.output


async def test_a_flood_is_a_few_lines_and_does_not_slow_the_build(pool):
    places = " ".join(f"tcp:{DENIED}:{port}" for port in range(2000, 2300))
    client, result = await build(pool, f"{START}RUN probe {places}\n")
    assert result.HasField("success"), result
    ((_, said),) = lines(client).items()
    assert 20 <= len(said) <= 21
    kept = await record(pool, client.assigned.build_id)
    assert 100 <= len(kept["refused"]) <= 300


async def test_steps_of_a_pool_with_proxied_are_kept_by_url(world, monkeypatch):
    policy = POLICY.replace("posture", "proxied = true\nposture", 1)
    async with firewalled(world, monkeypatch, policy) as pool:
        fetch = "RUN busybox wget -q -O /x http://{}/ || true\n"
        steps = START + fetch.format("files.example") + fetch.format("evil.example")
        client, result = await build(pool, steps)
        assert result.HasField("success"), result
        kept = await record(pool, client.assigned.build_id)
        assert "http://files.example/" in {item["url"] for item in kept["reached"]}
        (refused,) = [item for item in kept["refused"] if item["url"]]
        assert refused["url"] == "http://evil.example/"
        assert "evil.example" in (refused["step"] or "")
