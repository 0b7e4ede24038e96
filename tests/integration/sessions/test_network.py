"""Networks of docker engines behind the node's firewall, with a real engine and containers."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from offload_builder.egress.firewall import links, ruleset
from offload_builder.egress.held import HeldPolicies
from offload_builder.node.config import NodeConfig
from offload_builder.node.isolation import Isolation
from offload_builder.node.sessions.network import SessionNetworks
from offload_cache.registry.grants import Registry
from offload_cache.registry.server import RegistryServer
from offload_core.errors import ConfigError, NotFoundError, QuotaExceededError
from offload_core.trust import split_address
from offload_proto.v1.nodes_service_pb2 import AttachResponse
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import (
    ALLOWED,
    DENIED,
    MACHINE,
    METADATA,
    PRIVATE,
    World,
    attempt,
    inside,
)
from tests.fixtures.engine import DockerEngine
from tests.fixtures.guardedengine import busybox_archive, write_runtime
from tests.fixtures.nameserver import name_server

NAMES = (f"files.example. 60 IN A {ALLOWED}", f"evil.example. 60 IN A {DENIED}")
POLICY = """\
posture = "allowlist"

[[rule]]
id = "files"
allow = ["files.example"]
ports = [80]
"""
URLS = """\
[[rule]]
id = "one-page"
allow = ["http://evil.example/page"]
"""
OK = f"hello from {ALLOWED}"


class Behind:
    """A node's firewall at a machine of the tests, and networks for engines."""

    def __init__(self, isolation, policies, networks, stack):
        self.isolation = isolation
        self.policies = policies
        self.networks = networks
        self.stack = stack

    async def attach(self, key):
        return await self.stack.enter_async_context(self.networks.attach(key))

    async def say(self, text, version=1):
        message = AttachResponse()
        message.egress_policies.policies.add(version=version, file="policy.toml", text=text)
        self.policies.take_message(message)
        async with asyncio.timeout(20):
            await self.policies.settled()


@pytest.fixture
async def behind(tmp_path, monkeypatch):
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World())
        monkeypatch.setattr("offload_builder.node.isolation.OUR_NAMESPACE", world.machine.path)
        names = await stack.enter_async_context(name_server(*NAMES))
        config = NodeConfig(
            gateway="127.0.0.1:1",
            data=tmp_path / "data",
            isolation="netns",
            dns_servers=[str(names.server)],
        )
        registry = await stack.enter_async_context(RegistryServer(Registry()))
        policies = HeldPolicies(tmp_path / "egress.json")
        await stack.enter_async_context(policies)
        isolation = Isolation(config, registry, policies)
        await stack.enter_async_context(isolation)
        yield Behind(isolation, policies, SessionNetworks(isolation, registry), stack)


async def at(network, host, port=80):
    """What a process of the engine itself reaches."""
    async with inside(network.namespace) as run:
        return await run(attempt, host, port)


async def test_a_container_reaches_what_the_policy_allows_and_its_own_session(behind, tmp_path):
    await behind.say(POLICY)
    network = await behind.attach("one")
    arguments = ["--dns", network.dns, "--mtu", str(network.mtu)]
    arguments += ["--add-runtime", f"own={write_runtime(tmp_path)}", "--default-runtime=own"]
    arguments += ["--insecure-registry", network.registry]
    engine = DockerEngine("containerd", inside=network.namespace, arguments=arguments)
    await asyncio.to_thread(engine.start)
    try:
        await with_containers(behind, network, engine)
    finally:
        await asyncio.to_thread(engine.stop)


async def with_containers(behind, network, engine):
    async def docker(*words, stdin=None):
        done = await asyncio.to_thread(engine.docker, *words, stdin=stdin)
        return done.returncode, (done.stdout + done.stderr).decode()

    async def probed(*places, options=()):
        code, text = await docker("run", "--rm", *options, "busybox", "probe", *places)
        assert code == 0, text
        found = found_in(text)
        return [found[place].partition(" ")[0] for place in places]

    image = busybox_archive({"bin/probe": await asyncio.to_thread(egress_probe)})
    assert (await docker("import", "-", "busybox", stdin=image))[0] == 0
    here = f"http:{ALLOWED}:80/"
    assert await probed(here) != ["ok"]
    await behind.networks.assign("one", "web")
    places = ["http:files.example:80/", "tcp:evil.example:80", f"tcp:{DENIED}:80"]
    places += [f"tcp:{METADATA}:80", f"tcp:{PRIVATE}:80", f"tcp:{MACHINE}:7450"]
    found = await probed(*places)
    assert found[0] == "ok"
    assert "ok" not in found[1:], found
    assert any("evil.example" in line for line in network.refused), network.refused
    # Containers of one session see each other; on a network of their own by their names.
    assert (await docker("network", "create", "own"))[0] == 0
    serve = "mkdir -p /www; echo from-web > /www/index.html; exec httpd -f -h /www"
    started = ("run", "-d", "--name", "web", "--network", "own", "-p", "8081:80", "busybox")
    code, text = await docker(*started, "sh", "-c", serve)
    assert code == 0, text
    on_own = ("--network", "own")
    async with asyncio.timeout(30):
        while await probed("http:web:80/", options=on_own) != ["ok"]:
            await asyncio.sleep(0.1)
    assert await probed("http:files.example:80/", options=on_own) == ["ok"]
    # What is published is there for whoever dials in the engine's namespace.
    assert "from-web" in await at(network, "127.0.0.1", 8081)
    # The engine reaches the node's registry; containers of it do not, nor anybody else.
    host, port = split_address(network.registry)
    assert "errno" not in await at(network, host, port)
    assert await probed(f"tcp:{network.registry}") != ["ok"]
    assert await probed(f"tcp:{network.registry}", options=on_own) != ["ok"]
    other = await behind.attach("two")
    await behind.networks.assign("two", "web")
    own = network.dns.rpartition(".")[0] + ".2"
    assert "from-web" in await at(network, own, 8081)
    assert "from-web" not in await at(other, own, 8081)
    # It does not end by itself, and an engine that stops waits for it.
    assert (await docker("rm", "-f", "web"))[0] == 0
    # Nobody has asked for anything; it follows all the same.
    await behind.say('posture = "allowlist"\n', version=2)
    assert "ok" not in await probed("http:files.example:80/", here)


async def test_nothing_is_reached_before_there_is_a_project_and_while_rules_fail(behind):
    network = await behind.attach("one")
    assert await at(network, ALLOWED) != OK
    await behind.networks.assign("one", "web")
    assert await at(network, ALLOWED) == OK
    firewall = behind.isolation.firewall
    (key,) = behind.isolation.places.keys
    # Somebody has changed its rules, so they cannot be replaced.
    found = firewall._attached[key]
    slot, force = found.network.addresses.slot, found.in_force
    element = f'element {ruleset.TABLE} current {{ "p{slot}" . {force.mark} }}'
    await firewall.router.change(f"delete {element}")
    message = AttachResponse()
    message.egress_policies.policies.add(version=1, file="policy.toml", text=POLICY)
    behind.policies.take_message(message)
    async with asyncio.timeout(20):
        while await at(network, ALLOWED) == OK:
            await asyncio.sleep(0.05)
    await firewall.router.change(f"add {element}")
    async with asyncio.timeout(20):
        await behind.policies.settled()
    assert firewall.policy(key).base.version == 1
    # It may ask for names again, so it is reachable as before.
    async with inside(network.namespace) as run:
        await run(lambda: socket.create_connection((network.dns, 53), 10).close())


async def test_servers_of_rules_by_url_are_not_open_to_sessions(behind):
    await behind.say("proxied = true\n" + POLICY + URLS)
    network = await behind.attach("one")
    await behind.networks.assign("one", "web")
    verdict = behind.isolation.firewall.policy(behind.isolation.places.keys[0])
    assert [rule.id for rule in verdict.base.rules if rule.urls] == []
    assert await at(network, DENIED) != f"hello from {DENIED}"


async def test_a_network_has_one_project_and_its_counts_are_that_projects(behind):
    network = await behind.attach("one")
    await behind.networks.assign("one", "web")
    await behind.networks.assign("one", "web")
    with pytest.raises(QuotaExceededError):
        await behind.networks.assign("one", "other")
    with pytest.raises(NotFoundError):
        await behind.networks.assign("nobody", "web")
    with pytest.raises(QuotaExceededError):
        await behind.attach("one")
    await at(network, METADATA)
    await behind.isolation.counts.refresh()
    assert sum(behind.isolation.counts.by_project()["web"].values()) >= 1


async def test_root_of_a_user_namespace_may_set_its_network_up(behind):
    holder = await asyncio.to_thread(
        subprocess.Popen,
        ["unshare", "--user", "--map-root-user", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdin.write(b".")
        holder.stdin.flush()
        assert await asyncio.to_thread(holder.stdout.read, 1) == b"."
        users = behind.networks.attach("owned", Path(f"/proc/{holder.pid}/ns/user"))
        network = await behind.stack.enter_async_context(users)
        enter = ["nsenter", f"--user=/proc/{holder.pid}/ns/user", f"--net={network.namespace}"]
        make = [*enter, "ip", "link", "add", "bridge0", "type", "bridge"]
        done = await asyncio.to_thread(subprocess.run, make, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        async with inside(network.namespace) as run:
            assert "bridge0" in await run(links.device_names)
    finally:
        holder.kill()
        holder.communicate()


async def test_a_node_without_a_firewall_takes_no_sessions_and_says_why(tmp_path):
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path / "data", isolation="none")
    async with (
        RegistryServer(Registry()) as registry,
        HeldPolicies(tmp_path / "egress.json") as policies,
        Isolation(config, registry, policies) as isolation,
    ):
        networks = SessionNetworks(isolation, registry)
        assert "isolation is none" in networks.why_impossible()
        with pytest.raises(ConfigError, match="no sessions"):
            await networks.attach("one").__aenter__()
