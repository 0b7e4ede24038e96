"""Ways around the firewall by what a connection to an allowed address asks for."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import sys
import time
from dataclasses import replace

import pytest

from offload_builder.clienthello import ClientHello, parse_client_hello
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.model import EffectivePolicy, PortRange, Protocol
from offload_builder.egress.resolver.contract import Admission, Grant
from tests.fixtures.bypasslab import Outcome, filled
from tests.fixtures.bypassways import CONTENTS, KINDS, Way
from tests.fixtures.egressworld import (
    DENIED,
    DENIED6,
    allowlist,
    inside,
    open_policy,
    rule,
)
from tests.fixtures.nameserver import allowing
from tests.fixtures.packettap import PacketTap

POLICY = allowing("good.test", "other.test", ports=(80, 443))
ADMITTED = [
    Admission(ipaddress.ip_address(host), Grant(Protocol.TCP, PortRange(port, port)), False, 60)
    for host in (DENIED, DENIED6)
    for port in (80, 443)
]
STILL = [replace(one, open_only=True) for one in ADMITTED]


def asking(host: str, name: str) -> str:
    """Ask an HTTP server for a name; return the beginning of its answer, or what went wrong."""
    try:
        with socket.create_connection((host, 80), timeout=2) as made:
            made.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
            return made.recv(15).decode()
    except OSError as error:
        return type(error).__name__


def long_hello(name: str) -> bytes:
    """Return a hello that takes several segments."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([f"protocol-{number:04}" * 10 for number in range(40)])
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def saying(host: str, data: bytes, pause: float) -> bytes:
    with socket.create_connection((host, 443), timeout=5) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sendall(data[:700])
        time.sleep(pause)
        made.sendall(data[700:])
        return made.recv(100)


@pytest.mark.parametrize("way", CONTENTS, ids=lambda way: way.name)
def test_no_way_by_contents_leads_anywhere(outcome: Outcome, way: Way) -> None:
    for kind in KINDS:
        result = outcome.results[kind][filled(way.place, outcome.places)]
        assert result.startswith(way.ends), (kind, result)
    told = b"".join((*outcome.heads, *outcome.hellos))
    assert not way.asks or way.asks.encode() not in told


def test_tls_that_asks_for_an_allowed_name_arrives_byte_by_byte(outcome: Outcome) -> None:
    hellos = [parse_client_hello(data) for data in outcome.hellos]
    assert hellos == [ClientHello("files.allowed.test")] * len(KINDS)


async def test_a_hello_of_many_segments_arrives_once_it_is_whole(world, watched):
    data = long_hello("good.test")
    assert len(data) > 4000
    for host in (DENIED, DENIED6):
        await world.listen(world.world, host, 443)
    async with watched.firewall.attach("one", POLICY) as network, inside(network.namespace) as run:
        await watched.firewall.apply("one", POLICY, ADMITTED)
        for host in (DENIED, DENIED6):
            for pause in (0.0, 0.5):
                world.hellos.clear()
                assert await run(saying, host, data, pause) == b"heard\r\n"
                assert data.startswith(world.hellos[0])


async def test_names_are_looked_for_with_ipv6_as_well_and_refusals_are_told(world, watched):
    async with watched.firewall.attach("one", POLICY) as network, inside(network.namespace) as run:
        await watched.firewall.apply("one", POLICY, ADMITTED)
        for host in (DENIED, DENIED6):
            assert await run(asking, host, "good.test") == "HTTP/1.1 200 OK"
            assert await run(asking, host, "evil.test") == "ConnectionResetError"
        await asyncio.sleep(0.1)
    told = [one for one in watched.told if one.stage is Stage.NAME]
    assert {(str(one.address), one.port, one.asked) for one in told} == {
        (DENIED, 80, "evil.test"),
        (DENIED6, 80, "evil.test"),
    }
    assert not any(b"evil" in head for head in world.heads)


async def test_nothing_is_said_to_a_server_while_nobody_reads(world, watched):
    async with (
        watched.firewall.attach("one", POLICY) as network,
        inside(network.namespace) as run,
        PacketTap(world.machine) as tap,
    ):
        await watched.firewall.apply("one", POLICY, ADMITTED)
        await watched.firewall._names.__aexit__()
        assert await run(asking, DENIED, "good.test") == "TimeoutError"
        assert tap.to(DENIED)
    assert world.heads == []


FLOOD = """
import socket, struct, sys, time
end, made = time.monotonic() + 3, 0
while time.monotonic() < end:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.settimeout(0.05)
    try:
        one.connect((sys.argv[1], 443))
        one.sendall(b"\\x16\\x03\\x01\\x40\\x00" + b"\\x01\\x00\\x80\\x00" + bytes(12000))
        made += 1
    except OSError:
        pass
    one.close()
print(made)
"""
"""Begins connections, and says the beginning of a hello that has no end."""


async def test_a_project_that_floods_with_first_bytes_keeps_no_other_from_its_names(world, watched):
    firewall = watched.firewall
    await world.listen(world.world, DENIED, 443)
    lags: list[float] = []

    async def look() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - began)

    async with (
        firewall.attach("loud", POLICY) as loud,
        firewall.attach("quiet", POLICY) as quiet,
        inside(quiet.namespace) as run,
    ):
        for key in ("loud", "quiet"):
            await firewall.apply(key, POLICY, ADMITTED)
        command = ["nsenter", f"--net={loud.namespace}", sys.executable, "-c", FLOOD, DENIED]
        floods = [
            await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            for _ in range(2)
        ]
        await asyncio.sleep(0.5)
        looking = asyncio.create_task(look())
        took = []
        for _ in range(10):
            began = time.perf_counter()
            assert await run(asking, DENIED, "good.test") == "HTTP/1.1 200 OK"
            took.append(time.perf_counter() - began)
        looking.cancel()
        made = [int((await one.communicate())[0]) for one in floods]
    assert sum(made) > 100
    assert sorted(took)[5] < 0.5
    assert sorted(lags)[len(lags) // 2] < 0.05


async def test_a_name_that_is_no_longer_allowed_is_cut_though_its_address_is(world, watched):
    def begin(name: str) -> socket.socket:
        made = socket.create_connection((DENIED, 80), timeout=5)
        made.sendall(f"GET /stream/20 HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        assert made.recv(65536)
        return made

    def read_on(made: socket.socket) -> str:
        try:
            end = time.monotonic() + 0.7
            while time.monotonic() < end:
                assert made.recv(1 << 20)
        except OSError as error:
            return type(error).__name__
        return "goes on"

    tighter = allowing("other.test", ports=(80, 443))
    async with watched.firewall.attach("one", POLICY) as network, inside(network.namespace) as run:
        await watched.firewall.apply("one", POLICY, ADMITTED)
        with await run(begin, "good.test") as good, await run(begin, "other.test") as other:
            await watched.firewall.apply("one", POLICY, [*ADMITTED, *STILL])
            assert await run(read_on, other) == "goes on"
            assert await run(read_on, good) == "goes on"
            await watched.firewall.apply("one", tighter, [*ADMITTED, *STILL])
            assert await run(read_on, good) == "ConnectionResetError"
            assert await run(read_on, other) == "goes on"


async def test_no_policy_of_a_build_takes_the_check_away(watched):
    anywhere = allowlist(rule("all", "0.0.0.0/0")).base
    anyhow = open_policy().base
    for base, *narrowed in (
        (POLICY.base, anywhere),
        (POLICY.base, anyhow, anywhere),
        (anyhow, POLICY.base),
    ):
        policy = EffectivePolicy(base, tuple(narrowed))
        async with (
            watched.firewall.attach("one", policy) as network,
            inside(network.namespace) as run,
        ):
            await watched.firewall.apply("one", policy, ADMITTED)
            assert await run(asking, DENIED, "good.test") == "HTTP/1.1 200 OK"
            assert await run(asking, DENIED, "evil.test") == "ConnectionResetError"
            # Nothing is left of it for another one.
            await watched.firewall.apply("one", POLICY, ADMITTED)
            await watched.firewall.apply("one", policy, ADMITTED)


async def test_a_pool_can_do_without(watched):
    policy = EffectivePolicy(replace(POLICY.base, check_names=False))
    async with watched.firewall.attach("one", policy) as network, inside(network.namespace) as run:
        await watched.firewall.apply("one", policy, ADMITTED)
        assert await run(asking, DENIED, "evil.test") == "HTTP/1.1 200 OK"
