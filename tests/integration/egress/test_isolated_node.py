"""A whole node whose projects are behind the firewall."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from offload_builder.egress.firewall import links, ruleset
from offload_builder.egress.held import HeldPolicies
from offload_builder.node.config import NodeConfig
from offload_builder.node.isolation import Isolation
from offload_builder.node.isolationmode import wanted
from offload_builder.node.trustdomain import TrustDomain
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_core.errors import AccessDeniedError, ConfigError
from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from offload_proto.v1.nodes_service_pb2 import AttachResponse
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import ALLOWED, DENIED, MACHINE, METADATA, PRIVATE
from tests.fixtures.nameserver import name_server
from tests.fixtures.node import NodePool, RawClient

STEPS = """\
ADD --chmod=755 http://203.0.113.10/probe /bin/probe
RUN probe {}
RUN date +%N > /made && echo made-it
"""


@pytest.fixture
def machine(world, monkeypatch):
    """The namespace that nodes take for their machine's."""
    monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
    return world.machine


def config(tmp_path, **options) -> NodeConfig:
    return NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", **options)


async def built(pool: NodePool, steps: str) -> RawClient:
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned, steps)
    await client.start()
    result = await client.until("result")
    assert result.HasField("success"), result
    await client.done()
    return client


async def ended(pool: NodePool, dockerfile: str):
    """Return the result of a build of a Dockerfile without the usual base."""
    assigned = await pool.assigned()
    client = RawClient(await pool.channel(assigned), assigned)
    client.dockerfile = dockerfile
    await client.start()
    result = await client.until("result")
    await client.done()
    return result


def printed(client: RawClient) -> str:
    return b"".join(log.data for seen in client.seen for log in seen.progress.logs).decode()


async def test_builds_of_an_isolated_node_use_its_cache_and_reach_nothing_of_it(world, machine):
    places = [f"http:{ALLOWED}:80/", f"tcp:{MACHINE}:7450", f"tcp:{METADATA}:80"]
    places.append(f"tcp:{PRIVATE}:80")
    world.files["/probe"] = egress_probe()
    async with NodePool() as pool:
        agent = await pool.start_node(isolation="netns")
        assert any(n.startswith("ob") for n in await machine.run(links.device_names))
        first = await built(pool, STEPS.format(" ".join(places)))
        found = found_in(printed(first))
        assert [found[place] for place in places] == ["ok 23", "refused", "refused", "refused"]
        async with asyncio.timeout(30):
            while (
                await pool.build(first.assigned.build_id)
            ).cache_state != builds_pb.CACHE_STATE_PUBLISHED:
                await asyncio.sleep(0.05)
        runtime = await agent.runtime("default", "")
        assert not runtime.registry_address.startswith("127.")
        # What BuildKit itself has is taken away: the rest comes from the registry.
        await pool.stop_node()
        await asyncio.to_thread(shutil.rmtree, runtime._daemon.settings.root)
        await pool.start_node(isolation="netns")
        again = await built(pool, STEPS.format(" ".join(places)))
        assert "made-it" not in printed(again)
        await pool.stop_node()
        assert not any(n.startswith("ob") for n in await machine.run(links.device_names))


POLICY = """\
posture = "allowlist"
contact = "#builds"

[[rule]]
id = "files"
allow = ["files.example", "*.wild.example"]
ports = [80]
"""
NAMES = (
    f"files.example. 60 IN A {ALLOWED}",
    f"sub.wild.example. 60 IN A {METADATA}",
    f"evil.example. 60 IN A {DENIED}",
)


async def test_builds_obey_the_policy_that_the_gateway_said(world, machine):
    world.files["/probe"] = egress_probe()
    places = [
        "http:files.example:80/",
        "tcp:files.example:8080",
        "tcp:evil.example:80",
        "tcp:sub.wild.example:80",
        f"tcp:{DENIED}:80",
    ]
    start = "ADD --chmod=755 http://files.example/probe /bin/probe\n"
    told = []
    async with NodePool() as pool, name_server(*NAMES) as names:
        agent = await pool.start_node(isolation="netns", dns_servers=[str(names.server)])
        agent.isolation.told.listeners.append(told.append)
        # Open, as nobody has said anything yet.
        first = await built(pool, start + "RUN probe tcp:evil.example:80\n")
        assert found_in(printed(first))["tcp:evil.example:80"] == "ok"
        stub = EgressServiceStub(await pool.gateway.channel(await pool.gateway.login("")))
        request = ApplyPolicyRequest(text=POLICY, file="policy.toml")
        await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
        policies = pool._running["one"][0].policies
        async with asyncio.timeout(20):
            await policies.wait_for(lambda held: held.versions() == {"": 1})
        second = await built(pool, start + f"RUN probe {' '.join(places)}\n")
        found = found_in(printed(second))
        assert found["http:files.example:80/"] == "ok 23"
        assert found["tcp:files.example:8080"] == found[f"tcp:{DENIED}:80"] == "refused"
        assert "ok" not in (found["tcp:evil.example:80"], found["tcp:sub.wild.example:80"])
        # Base images come by the node's mirror, which is outside of the firewall.
        for line in ("FROM busybox:1\n", f"FROM scratch\nADD http://{DENIED}/ /f\n"):
            refused = await ended(pool, line)
            assert "egress: " in refused.failure.message, refused
            assert "ask #builds" in refused.failure.message
        # Pushes of the node itself, too.
        judge = agent.isolation.judge("default")
        assert judge is not None
        judge.check("files.example:80", "app")
        with pytest.raises(AccessDeniedError, match=r"egress: evil\.example:5000/app was refused"):
            judge.check("evil.example:5000", "app")
        await asyncio.sleep(0.3)
    denied = {(str(one), one.verdict.rule_id) for one in told if not one.verdict.allowed}
    assert ("files.example:8080", "default-deny") in denied
    assert ("evil.example", "default-deny") in denied
    assert any(target == f"{DENIED}:80" or target == "evil.example:80" for target, _ in denied)
    assert any(str(one) == "files.example:80" for one in told if one.verdict.allowed)


async def test_a_node_on_the_machine_takes_no_builds_once_there_is_a_policy(tmp_path):
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config(tmp_path, isolation="none"), registry, policies) as isolation,
    ):
        assert isolation.why_refused() == ""
        message = AttachResponse()
        message.egress_policies.policies.add(version=1, file="policy.toml", text=POLICY)
        policies.take_message(message)
        async with asyncio.timeout(10):
            await policies.settled()
        assert "cannot enforce" in isolation.why_refused()
        with pytest.raises(ConfigError, match="cannot enforce"):
            async with isolation.place(TrustDomain("web")):
                pass


async def test_a_place_that_cannot_obey_keeps_no_other_under_the_old_policy(machine, tmp_path):
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config(tmp_path, isolation="netns"), registry, policies) as isolation,
        isolation.place(TrustDomain("broken")) as first,
        isolation.place(TrustDomain("whole")) as second,
    ):
        # What a place begins with is applied beside what opens it.
        await first.ready()
        await second.ready()
        firewall = isolation.firewall
        assert firewall is not None
        broken, whole = isolation.places.keys
        # Somebody has changed its rules, so they cannot be replaced.
        slot, force = (found := firewall._attached[broken]).network.addresses.slot, found.in_force
        element = f'element {ruleset.TABLE} current {{ "p{slot}" . {force.mark} }}'
        await firewall.router.change(f"delete {element}")
        message = AttachResponse()
        message.egress_policies.policies.add(version=1, file="policy.toml", text=POLICY)
        policies.take_message(message)
        async with asyncio.timeout(5):
            while firewall.policy(whole).base.version != 1:
                await asyncio.sleep(0.01)
        assert firewall.policy(broken).base.version == 0
        assert policies.versions_in_force() == {}
        await firewall.router.change(f"add {element}")
        async with asyncio.timeout(10):
            await policies.settled()
        assert firewall.policy(broken).base.version == 1


async def test_a_pool_with_a_policy_has_no_node_that_cannot_enforce_it(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot enforce"):
        wanted(config(tmp_path, isolation="none"), must=True)
    monkeypatch.setenv("OFFLOAD_CNI", str(tmp_path))
    for isolation in ("auto", "netns"):
        with pytest.raises(ConfigError, match="CNI plugins"):
            wanted(config(tmp_path, isolation=isolation), must=True)
    assert not wanted(config(tmp_path), must=False)
    with pytest.raises(ConfigError, match="isolation"):
        config(tmp_path, isolation="maybe")


async def test_a_node_whose_builds_are_on_the_machine_changes_nothing_there(machine, tmp_path):
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config(tmp_path, isolation="none"), registry, policies) as isolation,
    ):
        assert isolation.firewall is None
        assert "ob" not in {name[:2] for name in await machine.run(links.device_names)}
