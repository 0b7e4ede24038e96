"""The resolver behind the real firewall, with a real DNS server of the node."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dns.exception
import dns.message
import dns.query
import dns.rcode
import pytest
from prometheus_client import CollectorRegistry

from offload_builder.egress.firewall import links
from offload_builder.egress.resolver.dnssockets import open_dns_sockets
from offload_builder.egress.resolver.metrics import ResolverMetrics
from offload_builder.egress.resolver.projectview import ViewLimits
from offload_builder.egress.resolver.service import ResolverService, ResolverSettings
from offload_builder.egress.resolver.upstreams import Server
from offload_core.errors import InternalError
from tests.fixtures.dnsmasq import Dnsmasq, dnsmasq
from tests.fixtures.egressworld import PRIVATE, Watched, World, inside
from tests.fixtures.nameserver import Recorder, allowing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_builder.egress.firewall.projectnet import ProjectNetwork

HOSTS = "203.0.113"
NAMES = tuple(f"{HOSTS}.{128 + number} n{number}.allowed.test" for number in range(100))
RULES = allowing("*.allowed.test")


@dataclass
class Lab:
    """A project behind the firewall, seen from its namespace."""

    watched: Watched
    network: ProjectNetwork
    upstream: Dnsmasq
    run: Any
    heard: Recorder = field(default_factory=Recorder)

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        query = dns.message.make_query(name, kind, use_edns=0)
        send = dns.query.tcp if tcp else dns.query.udp
        return await self.run(send, query, self.network.addresses.gateway_v4, 5)

    async def connect(self, address: str, port: int = 443) -> bool:
        def attempt() -> bool:
            try:
                socket.create_connection((address, port), timeout=3).close()
            except ConnectionRefusedError:
                return False
            return True

        return await self.run(attempt)

    @asynccontextmanager
    async def serving(self, grace_seconds: int = 1) -> AsyncIterator[ResolverService]:
        settings = ResolverSettings(
            servers=(Server("127.0.0.1", self.upstream.port),),
            limits=ViewLimits(grace_seconds=grace_seconds),
        )
        firewall, metrics = self.watched.firewall, ResolverMetrics(CollectorRegistry())
        gateway = self.network.addresses.gateway_v4
        async with (
            ResolverService(settings, book=firewall, listener=self.heard, metrics=metrics) as made,
            made.serving("shop", firewall.router.inside, [gateway], RULES),
        ):
            yield made


@pytest.fixture
async def lab(world: World, watched: Watched, tmp_path: Path) -> AsyncIterator[Lab]:
    await world.world.run(links.run_ip, [f"route add local {HOSTS}.128/25 dev lo"])
    await world.serve(world.world, "0.0.0.0", 443)
    with dnsmasq(tmp_path, hosts=NAMES) as upstream:
        async with (
            watched.firewall.attach("shop", RULES) as network,
            inside(network.namespace) as run,
        ):
            yield Lab(watched, network, upstream, run)


def address_of(answer: dns.message.Message) -> str:
    return answer.answer[0][0].to_text()


async def test_100_of_100_names_are_reachable_as_soon_as_they_are_answered(lab: Lab) -> None:
    async with lab.serving():
        for number in range(100):
            address = f"{HOSTS}.{128 + number}"
            assert not await lab.connect(address)
            assert address_of(await lab.ask(f"n{number}.allowed.test")) == address
            assert await lab.connect(address), number


async def test_answers_and_refusals_say_who_asked(lab: Lab) -> None:
    async with lab.serving():
        for tcp in (False, True):
            assert address_of(await lab.ask("n1.allowed.test", tcp=tcp))
            assert lab.heard.answers[-1].source == lab.network.addresses.daemon_v4
            refused = await lab.ask("data.evil.test", tcp=tcp)
            assert refused.rcode() == dns.rcode.REFUSED
            assert lab.heard.refusals[-1].source == lab.network.addresses.daemon_v4


async def test_an_address_can_be_reached_as_long_as_its_answer_is_good(lab: Lab) -> None:
    async with lab.serving():
        address = address_of(await lab.ask("n2.allowed.test"))
        assert await lab.connect(address)
        assert not await lab.connect(address, 8080)
        deadline = time.monotonic() + 12
        while await lab.connect(address):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)
        assert address_of(await lab.ask("n2.allowed.test")) == address
        assert await lab.connect(address)


async def test_a_name_that_flips_to_a_protected_address_loses_it(lab: Lab) -> None:
    async with lab.serving():
        assert address_of(await lab.ask("n3.allowed.test"))
        for bad in ("169.254.169.254", PRIVATE, "127.0.0.1"):
            lab.upstream.write(f"{bad} n3.allowed.test")
            async with asyncio.timeout(15):
                while (await lab.ask("n3.allowed.test")).answer:
                    await asyncio.sleep(0.3)
            assert not (await lab.ask("n3.allowed.test", tcp=True)).answer
            assert lab.heard.refusals[-1].rule_id.startswith("protected-")
            assert not await lab.connect(bad if bad != "127.0.0.1" else PRIVATE, 80)


async def test_a_new_policy_keeps_what_it_allows_and_nothing_else(lab: Lab) -> None:
    firewall = lab.watched.firewall
    async with lab.serving(grace_seconds=30) as service:
        kept = address_of(await lab.ask("n7.allowed.test"))
        gone = address_of(await lab.ask("n8.allowed.test"))
        tighter = allowing("n7.allowed.test")
        await firewall.apply("shop", tighter, service.replace_policy("shop", tighter))
        assert await lab.connect(kept)
        assert not await lab.connect(gone)
        assert (await lab.ask("n8.allowed.test")).rcode() == dns.rcode.REFUSED


async def test_names_fail_without_the_resolver_and_nothing_else_opens(lab: Lab) -> None:
    async with lab.serving(grace_seconds=30):
        address = address_of(await lab.ask("n4.allowed.test"))
    with pytest.raises((dns.exception.Timeout, OSError)):
        await lab.ask("n5.allowed.test", tcp=True)
    assert await lab.connect(address)
    assert not await lab.connect(f"{HOSTS}.133")
    async with lab.serving():
        assert await lab.connect(address_of(await lab.ask("n5.allowed.test")))


async def test_a_dead_server_fails_names_within_the_patience_of_programs(lab: Lab) -> None:
    async with lab.serving():
        lab.upstream.process.kill()
        began = time.monotonic()
        assert (await lab.ask("n6.allowed.test")).rcode() == dns.rcode.SERVFAIL
        assert time.monotonic() - began < 5
        assert not lab.heard.answers


async def test_sockets_can_be_made_before_their_address_and_only_once(lab: Lab) -> None:
    space = lab.watched.firewall.router.inside
    sockets = await open_dns_sockets(space, ["10.99.0.1", "fd99::1"])
    assert len(sockets.udp) == len(sockets.tcp) == 2
    with pytest.raises(InternalError, match="cannot listen for names"):
        await open_dns_sockets(space, ["10.99.0.1"])
    sockets.close()
