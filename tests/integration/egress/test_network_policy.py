"""Builds that bring policies of their own, on a node whose builds are behind the firewall."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offload_builder.egress.firewall.lifecycle import EgressFirewall
from offload_builder.egress.held import NOT_ENFORCED, HeldPolicies
from offload_builder.egress.policy.model import Posture
from offload_builder.egress.policy.ofbuild import read_build_policy
from offload_builder.node.config import NodeConfig
from offload_builder.node.isolation import Isolation
from offload_builder.node.place import Place
from offload_builder.node.trustdomain import TrustDomain
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_client.cli.inspection import StepList, as_json, as_text
from offload_core.errors import AccessDeniedError, ConfigError, InternalError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.contexts import BASE, busybox
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import ALLOWED, DENIED
from tests.fixtures.nameserver import name_server
from tests.fixtures.node import NodePool, RawClient
from tests.fixtures.pool import Member

FILES, OTHER, EVIL = "tcp:files.example:80", "tcp:other.example:80", "tcp:evil.example:80"
POOL = """\
pool = "eu-1"
posture = "allowlist"
contact = "#builds"

[[rule]]
id = "web"
allow = ["files.example", "other.example", "203.0.113.66"]
ports = [80]
"""
OWN = """\
[[rule]]
id = "mine"
allow = ["files.example", "evil.example"]

[[rule]]
id = "no-tracking"
deny = ["other.example"]
"""
ONLY_OTHER = '[[rule]]\nid = "other"\nallow = ["other.example"]\n'
NAMES = (
    f"files.example. 60 IN A {ALLOWED}",
    f"other.example. 60 IN A {DENIED}",
    f"evil.example. 60 IN A {DENIED}",
)
PROBE = "COPY probe.gz /\nRUN gunzip -c /probe.gz > /bin/probe && chmod 755 /bin/probe\n"
NONE = builds_pb.NetworkPolicy(file="--network-policy none")


def brought(text: str, file: str = "build.toml") -> builds_pb.NetworkPolicy:
    return builds_pb.NetworkPolicy(file=file, text=text)


async def applied(pool: NodePool, text: str, version: int) -> None:
    stub = EgressServiceStub(await pool.gateway.channel(await pool.gateway.login("")))
    request = ApplyPolicyRequest(text=text, file="policy.toml")
    await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
    policies = pool._running["one"][0].policies
    async with asyncio.timeout(20):
        await policies.wait_for(lambda held: held.versions() == {"": version})


@pytest.fixture
async def pool(world, monkeypatch):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    async with NodePool() as pool, name_server(*NAMES) as names:
        await pool.start_node(isolation="netns", dns_servers=[str(names.server)], slots=3)
        await applied(pool, POOL, 1)
        yield pool


async def build(pool: NodePool, steps: str, policy: builds_pb.NetworkPolicy | None):
    """Return the client and the result of a build that has a probe in its context."""
    assigned = await pool.assigned(network_policy=policy)
    client = RawClient(await pool.channel(assigned), assigned, PROBE + steps)
    client.files["probe.gz"] = (gzip.compress(egress_probe(), mtime=0), 0o100644)
    await client.start()
    result = await client.until("result")
    await client.done()
    return client, result


def printed(client: RawClient) -> str:
    return b"".join(log.data for seen in client.seen for log in seen.progress.logs).decode()


def narrowed(pool: NodePool):
    agent = pool._running["one"][0].agent
    return [item for item in agent._projects.running() if item.domain.narrowed]


async def shown(pool: NodePool, build_id: str):
    """Return what `offload inspect` shows."""
    stub = BuildsServiceStub(await pool.gateway.channel(pool.keys))
    steps = StepList()
    request = builds_pb.LogsRequest(build_id=build_id, follow=True)
    async for reply in stub.Logs(request, metadata=call_metadata(), timeout=20):
        for batch in reply.batches:
            steps.take(batch)
    record = await pool.build(build_id)
    return as_json(record, steps), as_text(record, steps)


async def test_a_build_reaches_what_pool_and_file_allow_and_is_told_the_line(pool):
    steps = f"RUN probe {FILES} {OTHER} {EVIL} tcp:{DENIED}:80\n"
    client, result = await build(pool, steps, brought(OWN))
    assert result.HasField("success"), result
    found = found_in(printed(client))
    assert found[FILES].startswith("ok"), found
    # Allowed by the pool only, twice by name and address; by the file only.
    for place in (OTHER, f"tcp:{DENIED}:80", EVIL):
        assert not found[place].startswith("ok"), found
    told = printed(client)
    assert "was refused other.example (rule no-tracking, build.toml:5); the build's own" in told
    assert f"was refused {DENIED}:80 (rule default-deny, build.toml); the build's own" in told
    assert "was refused evil.example (rule default-deny, pool eu-1); ask #builds" in told
    document, text = await shown(pool, client.assigned.build_id)
    places = {
        item["host"] or item["address"]: item["place"] for item in document["network"]["refused"]
    }
    assert places["other.example"] == "build.toml:5"
    assert document["network"]["policy"] == {
        "file": "build.toml", "pool_version": 1, "project_version": None,
    }  # fmt: skip
    assert "build.toml, within version 1 of the pool's" in text
    # Without the file the pool alone counts; its BuildKit knows nothing of the other's layers.
    client, result = await build(pool, steps.replace("probe", "probe ", 1), None)
    assert found_in(printed(client))[OTHER].startswith("ok")


async def test_none_reaches_nothing_but_builds_and_returns_the_image(pool):
    client, result = await build(
        pool,
        f"RUN probe {FILES} {OTHER} tcp:{ALLOWED}:80 tcp:{DENIED}:80\nRUN echo made > /made\n",
        NONE,
    )
    assert result.HasField("success"), result
    found = found_in(printed(client))
    assert len([place for place in found if place.startswith("tcp:")]) == 4
    assert not any(item.startswith("ok") for item in found.values()), found
    assert "(rule default-deny, --network-policy none)" in printed(client)
    # What BuildKit and the node fetch themselves is refused as well, before any step.
    for steps in ("ADD http://files.example/x /x\n", "FROM files.example/image\n"):
        _, result = await build(pool, steps, NONE)
        assert "egress: " in result.failure.message, result
        assert "--network-policy none" in result.failure.message
    # The next one finds a warm BuildKit with its cache.
    agent = pool._running["one"][0].agent
    await wait_idle(agent)
    (runtime,) = narrowed(pool)
    pid = runtime._daemon.pid
    client, result = await build(pool, f"RUN probe {FILES} {OTHER}\n", NONE)
    assert result.HasField("success"), result
    assert [item._daemon.pid for item in narrowed(pool)] == [pid]


async def test_ports_and_networks_of_the_file_count_for_names_too(pool):
    own = """\
    [[rule]]
    id = "elsewhere"
    allow = ["files.example"]
    ports = [8080]

    [[rule]]
    id = "all-names"
    allow = ["*.example"]
    ports = [80]

    [[rule]]
    id = "not-there"
    deny = ["203.0.113.66"]
    """
    wider = POOL.replace("ports = [80]", "ports = [80, 8080]")
    await applied(pool, wider, 2)
    places = f"{FILES} tcp:files.example:8080 {OTHER} tcp:{ALLOWED}:80"
    client, _ = await build(pool, f"RUN probe {places}\n", brought(own))
    found = found_in(printed(client))
    assert found[FILES].startswith("ok"), found
    assert found["tcp:files.example:8080"].startswith("ok"), found
    assert not found[OTHER].startswith("ok")
    only = brought('[[rule]]\nid = "p"\nallow = ["files.example"]\nports = [8080]\n')
    client, _ = await build(pool, f"RUN probe tcp:files.example:8080 {FILES}\n", only)
    found = found_in(printed(client))
    assert found["tcp:files.example:8080"].startswith("ok"), found
    assert not found[FILES].startswith("ok"), "the pool's port is not the build's"


async def wait_idle(agent) -> None:
    async with asyncio.timeout(30):
        while any(item.busy for item in agent._projects.running()):
            await asyncio.sleep(0.05)


async def test_builds_at_the_same_time_with_the_same_step_keep_their_policies(pool):
    """On one BuildKit the step would run once, under the policy of one of them."""
    steps = f"RUN probe {FILES} {OTHER} && sleep 2\n"
    mine = brought('[[rule]]\nid = "files"\nallow = ["files.example"]\n')
    results = await asyncio.gather(
        build(pool, steps, mine), build(pool, steps, brought(ONLY_OTHER)), build(pool, steps, NONE)
    )
    reached = []
    for client, result in results:
        assert result.HasField("success"), result
        found = found_in(printed(client))
        assert {FILES, OTHER} <= set(found), "the step was not this build's own"
        reached.append([place for place in (FILES, OTHER) if found[place].startswith("ok")])
    assert reached == [[FILES], [OTHER], []]
    assert len(narrowed(pool)) == 3


async def test_a_new_policy_of_the_pool_holds_for_builds_with_their_own(pool):
    client, _ = await build(pool, f"RUN probe {FILES}\n", brought(OWN))
    assert found_in(printed(client))[FILES].startswith("ok")
    tighter = (
        POOL.replace('"files.example", ', "") + '[[rule]]\nid = "e"\nallow = ["evil.example"]\n'
    )
    await applied(pool, tighter, 2)
    client, _ = await build(pool, f"RUN probe {FILES} {EVIL}\n", brought(OWN))
    found = found_in(printed(client))
    assert not found[FILES].startswith("ok")
    # The file alone has not opened it before; now both allow it.
    assert found[EVIL].startswith("ok"), found
    assert "was refused files.example (rule default-deny, pool eu-1)" in printed(client)
    assert len(narrowed(pool)) == 1


async def test_a_pool_without_a_policy_is_narrowed_as_well(world, monkeypatch):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    async with NodePool() as pool, name_server(*NAMES) as names:
        await pool.start_node(isolation="netns", dns_servers=[str(names.server)])
        client, _ = await build(pool, f"RUN probe {FILES} {OTHER}\n", brought(ONLY_OTHER))
        found = found_in(printed(client))
        assert not found[FILES].startswith("ok")
        assert found[OTHER].startswith("ok"), found
        # The node pushes from outside of the firewall, so it asks.
        domain = narrowed(pool)[0].domain
        agent = pool._running["one"][0].agent
        judge = agent.isolation.judge("default", domain.narrowed)
        with pytest.raises(AccessDeniedError, match=r"files.example/app was refused.*build.toml"):
            judge.check("files.example", "app")
        assert "build.toml" in judge("files.example", None, 443)
        judge.check("other.example", "app")


async def test_idle_ones_go_with_their_processes_and_their_files(pool, monkeypatch):
    monkeypatch.setattr("offload_builder.node.projectpool.MAX_RESTING", 1)
    monkeypatch.setattr("offload_builder.node.projectpool._LEAST_REST_SECONDS", 0.1)
    agent, pids = pool._running["one"][0].agent, []
    for number in range(3):
        _, result = await build(pool, f"RUN echo {number}\n", brought(f"# {number}\n"))
        assert result.HasField("success"), result
        await wait_idle(agent)
        (runtime,) = narrowed(pool)
        pids.append(runtime._daemon.pid)
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False, True]
    (folder,) = agent.config.data.glob("projects/*~net-*")
    assert folder == runtime.domain.folder(agent.config)


async def reaches(place: Place, host: str) -> bool:
    words = (*place.daemon.command_prefix, "curl", "-s", "-m", "2", f"http://{host}/")
    process = await asyncio.create_subprocess_exec(
        *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return await process.wait() == 0


async def test_a_rule_of_a_build_ends_while_a_step_still_runs(world, monkeypatch, tmp_path):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", isolation="netns")
    end = datetime.now(UTC) + timedelta(seconds=3)
    text = f'[[rule]]\nid = "soon"\nallow = ["{ALLOWED}"]\nexpires = {end.isoformat()}\n'
    domain = TrustDomain("web", "", read_build_policy(brought(text)))
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config, registry, policies) as isolation,
        isolation.place(domain) as place,
    ):
        await place.ready()
        assert await reaches(place, ALLOWED)
        assert not await reaches(place, DENIED)
        async with asyncio.timeout(15):
            while await reaches(place, ALLOWED):
                await asyncio.sleep(0.2)
        assert datetime.now(UTC) >= end


async def test_the_door_to_a_connector_closes_when_the_rule_of_a_build_ends(
    world, monkeypatch, tmp_path
):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", isolation="netns")
    office = 'posture = "open"\n[[rule]]\nid = "office"\nallow = ["a.corp"]\nvia = "connector"\n'
    told, online = nodes_pb.AttachResponse(), nodes_pb.AttachResponse()
    told.egress_policies.policies.add(version=1, file="pool.toml", text=office)
    project = online.served_destinations.projects.add(project_id="web")
    project.destinations.add(host="a.corp", port=80)
    end = datetime.now(UTC) + timedelta(seconds=3)
    text = f'[[rule]]\nid = "soon"\nallow = ["a.corp"]\nexpires = {end.isoformat()}\n'
    domain = TrustDomain("web", "", read_build_policy(brought(text)))
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config, registry, policies) as isolation,
        asyncio.timeout(20),
    ):
        policies.take_message(told)
        await policies.settled()
        isolation.take_served(online)
        async with isolation.place(domain):
            (place,) = isolation.places.doors._places.values()
            while not place.doors:
                await asyncio.sleep(0.05)
            while place.doors:
                await asyncio.sleep(0.05)
        assert datetime.now(UTC) >= end


async def test_a_project_that_cannot_be_enforced_holds_up_no_other(world, monkeypatch, tmp_path):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", isolation="netns")
    told = nodes_pb.AttachResponse()
    told.egress_policies.policies.add(version=1, file="p", text='posture = "allowlist"\n')
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config, registry, policies) as isolation,
        isolation.place(TrustDomain("shop")),
        isolation.place(TrustDomain("web")),
        asyncio.timeout(20),
    ):
        whole = isolation.firewall.apply

        async def broken(key, policy, admissions=()):
            if key == "shop":
                raise InternalError("nftables refused it")
            await whole(key, policy, admissions)

        monkeypatch.setattr(isolation.firewall, "apply", broken)
        policies.take_message(told)
        while isolation.firewall.policy("web").base.posture is not Posture.ALLOWLIST:
            await asyncio.sleep(0.05)
        while policies.problem != NOT_ENFORCED:
            await asyncio.sleep(0.05)
        assert isolation.firewall.policy("shop").base.posture is Posture.OPEN
        assert policies.versions_in_force() == {}


async def test_without_a_firewall_such_a_build_is_refused(world):
    del world
    async with NodePool(restart_grace=0.2) as pool:
        agent = await pool.start_node(isolation="none")
        await asyncio.sleep(0.3)
        error = await refusal(pool, NONE)
        assert "no node of this pool is behind a firewall" in error.message
        # A node does not believe that its gateway has looked.
        with pytest.raises(ConfigError, match="cannot enforce the build's --network-policy"):
            ticket = builds_pb.Ticket(build_id="b", project_id="default", network_policy=NONE)
            await agent._open(ticket, None, None, None)


async def test_a_file_with_a_mistake_is_refused_before_a_build_begins(pool):
    error = await refusal(pool, brought('[[rule]]\nid = "a"\nallow = ["10.1.2.3/8"]\n'))
    assert isinstance(error, ConfigError)
    assert error.message.startswith("build.toml:3: ")
    error = await refusal(pool, brought("x = 1\n" * 20_000))
    assert "build.toml is larger than 64 KiB" in error.message


async def test_our_command_sends_what_a_flag_or_a_variable_names(pool, tmp_path):
    token = await pool.gateway.create_token("ann", identity_pb.ROLE_ADMIN)
    member = Member(tmp_path, {})
    (tmp_path / "probe.gz").write_bytes(gzip.compress(egress_probe(), mtime=0))
    shutil.copy(busybox(), tmp_path / "busybox")
    (tmp_path / "Dockerfile").write_text(f"{BASE}{PROBE}RUN probe {FILES} {OTHER}\n")
    (tmp_path / "docker-bake.json").write_text('{"target": {"default": {"context": "."}}}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "build.toml").write_text(OWN)
    (tmp_path / "bad.toml").write_text('[[rule]]\nid = "a"\nallow = ["10.1.2.3/8"]\n')

    async def ran(program: str, *arguments: str, **environment: str) -> tuple[int, str]:
        done = await asyncio.to_thread(member.run, program, *arguments, **environment)
        return done.returncode, done.stdout + done.stderr

    address = f"https://{pool.gateway.address}"
    code, output = await ran("offload", "login", address, "--token", token)
    assert code == 0, output
    plain = ("--progress", "plain", "--no-cache")
    code, output = await ran("offload-build", *plain, "--network-policy", "sub/build.toml", ".")
    assert code == 0, output
    assert f"{FILES} ok" in output
    assert "refused other.example (rule no-tracking, build.toml:5)" in output
    for arguments in (("offload-build", *plain, "."), ("offload-build", "bake", *plain)):
        code, output = await ran(*arguments, OFFLOAD_NETWORK_POLICY="none")
        assert code == 0, output
        assert f"{FILES} ok" not in output
        assert "refused files.example (rule default-deny, --network-policy none)" in output
    code, output = await ran("offload-build", "bake", *plain, "--network-policy", "sub/build.toml")
    assert f"{FILES} ok" in output
    assert "rule no-tracking, build.toml:5" in output
    # A base image that comes with the build is no traffic of it.
    code, output = await ran("offload-build", "-o", "type=oci,dest=base.tar", ".")
    assert code == 0, output
    with tarfile.open(tmp_path / "base.tar") as archive:
        archive.extractall(tmp_path / "base", filter="data")
    (tmp_path / "sub" / "Dockerfile").write_text("FROM base\nRUN echo on-top > /top\n")
    own = ("--build-context", "base=oci-layout://base", "-o", "out", "sub")
    code, output = await ran("offload-build", *plain, "--network-policy", "none", *own)
    assert code == 0, output
    assert (tmp_path / "out" / "top").read_text() == "on-top\n"
    code, output = await ran("offload-build", "--network-policy", "bad.toml", ".")
    assert code == 3
    assert "bad.toml:3: " in output
    code, output = await ran("offload-build", "--network-policy", "away.toml", ".")
    assert code == 3
    assert "cannot read the network policy away.toml: No such file or directory" in output
    assert len(narrowed(pool)) == 2


async def refusal(pool: NodePool, policy: builds_pb.NetworkPolicy):
    from grpc import RpcError

    with pytest.raises(RpcError) as caught:
        await pool.assigned(network_policy=policy)
    return error_from_rpc(caught.value, peer="the gateway", unreachable=ConfigError)


async def test_a_place_is_closed_until_its_rules_hold(world, monkeypatch, tmp_path):
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", isolation="netns")
    broken = [InternalError("nft refused them")] * 2
    apply = EgressFirewall.apply

    async def sometimes(*arguments: object) -> None:
        if broken:
            raise broken.pop()
        await apply(*arguments)

    monkeypatch.setattr(EgressFirewall, "apply", sometimes)
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config, registry, policies) as isolation,
        isolation.place(TrustDomain("web")) as place,
    ):
        with pytest.raises(InternalError):
            await place.ready()
        assert not await reaches(place, ALLOWED)
        await place.ready()
        assert await reaches(place, ALLOWED)
