"""Connections that are open when a policy changes: those it still allows go on, others are cut."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from contextlib import asynccontextmanager

import pytest

from offload_builder.egress.policy.model import Action, Protocol
from offload_builder.egress.resolver.contract import Admission, Grant
from tests.fixtures.egressworld import (
    ALLOWED,
    ALLOWED6,
    DENIED,
    DENIED6,
    USUAL,
    allowlist,
    attempt,
    inside,
    open_policy,
    rule,
    without_check,
)
from tests.fixtures.packettap import PacketTap

BOTH = allowlist(rule("web", ALLOWED, DENIED, ALLOWED6, DENIED6, protocol=Protocol.ANY))
NAMES_ONLY = without_check(USUAL)
TIGHTER = {
    "rule-removed": USUAL,
    "denied": allowlist(
        rule("web", ALLOWED, DENIED), rule("no", DENIED, DENIED6, action=Action.DENY)
    ),
    "other-ports": allowlist(rule("web", ALLOWED, DENIED, DENIED6, ports=(443,))),
    "open-with-deny": open_policy(rule("no", DENIED, DENIED6, action=Action.DENY)),
}


class Download:
    """A download in a thread: how much came, and how it ended."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.received = 0
        self.ended = ""

    def run(self) -> None:
        try:
            with socket.create_connection((self.host, 80), timeout=5) as made:
                made.sendall(b"GET /stream/20 HTTP/1.1\r\nHost: x\r\n\r\n")
                while part := made.recv(1 << 20):
                    self.received += len(part)
                self.ended = "closed"
        except OSError as error:
            self.ended = type(error).__name__


@asynccontextmanager
async def echo(world, host: str, port: int):
    """A server that sends datagrams back, and three more after each that says so."""
    made = await world.world.bind_udp(host, port)
    got: list[bytes] = []
    peers: set[object] = set()

    def read() -> None:
        data, peer = made.recvfrom(2048)
        got.append(data)
        peers.add(peer)
        made.sendto(data, peer)

    asyncio.get_running_loop().add_reader(made, read)
    try:
        yield got, lambda data: [made.sendto(data, peer) for peer in peers]
    finally:
        asyncio.get_running_loop().remove_reader(made)
        made.close()


@pytest.mark.parametrize("change", TIGHTER)
async def test_a_download_that_is_no_longer_allowed_is_reset_at_once(world, watched, change):
    async with (
        watched.firewall.attach("one", BOTH) as network,
        inside(network.namespace) as run,
        inside(network.namespace) as run_more,
    ):
        downloads = [Download(DENIED), Download(DENIED6)]
        tasks = [
            asyncio.create_task(one(download.run))
            for one, download in zip((run, run_more), downloads, strict=True)
        ]
        async with asyncio.timeout(5):
            while not all(download.received for download in downloads):
                await asyncio.sleep(0.05)
        began = time.monotonic()
        await watched.firewall.apply("one", TIGHTER[change])
        await asyncio.gather(*tasks)
        assert time.monotonic() - began < 1.5
        assert [download.ended for download in downloads] == ["ConnectionResetError"] * 2


async def test_a_connection_that_waits_is_cut_before_it_says_more(world, watched):
    async with (
        watched.firewall.attach("one", BOTH) as network,
        inside(network.namespace) as run,
        PacketTap(world.machine) as tap,
    ):

        def begin(host: str) -> socket.socket:
            made = socket.create_connection((host, 80), timeout=3)
            made.sendall(b"GET / HTTP/1.1\r\nX: ")
            return made

        def go_on(made: socket.socket) -> str:
            try:
                made.sendall(b"secret\r\n\r\n")
                return made.recv(100).decode()
            except OSError as error:
                return type(error).__name__

        with await run(begin, DENIED) as bad, await run(begin, ALLOWED) as good:
            await watched.firewall.apply("one", USUAL)
            before = len(tap.to(DENIED))
            assert await run(go_on, bad) == "ConnectionResetError"
            assert (await run(go_on, good)).startswith("HTTP/1.1 200")
            assert len(tap.to(DENIED)) == before
        told = await watched.told_of(DENIED)
        assert told.allowed
        await asyncio.sleep(0.1)
        assert [one.allowed for one in watched.told if str(one.address) == DENIED][-1] is False
    assert {own for own, _ in world.requests} == {ALLOWED}


async def test_datagrams_stop_in_both_directions(world, watched):
    async with (
        echo(world, DENIED, 9999) as (got, send),
        watched.firewall.attach("one", BOTH) as network,
        inside(network.namespace) as run,
    ):
        with await run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as made:
            made.connect((DENIED, 9999))
            made.settimeout(0.4)
            loop = asyncio.get_running_loop()
            made.send(b"one")
            assert await loop.run_in_executor(None, made.recv, 100) == b"one"
            await watched.firewall.apply("one", USUAL)
            # Nothing of the project has asked since: the other side is judged as well.
            send(b"two")
            with pytest.raises(OSError):
                await loop.run_in_executor(None, made.recv, 100)
            with pytest.raises(OSError):
                made.send(b"three")
                await asyncio.sleep(0.1)
                made.send(b"four")
            assert got == [b"one"]


async def test_a_download_by_a_name_outlives_its_answer_if_the_name_stays_allowed(world, watched):
    async with (
        watched.firewall.attach("one", NAMES_ONLY) as network,
        inside(network.namespace) as run,
        inside(network.namespace) as run_more,
    ):
        address, grant = ipaddress.ip_address(DENIED), Grant(Protocol.TCP)
        await watched.firewall.admit("one", [Admission(address, grant, False, 1)])
        download = Download(DENIED)
        task = asyncio.create_task(run(download.run))
        await asyncio.sleep(2.2)
        assert await run_more(attempt, DENIED) == "errno 111"
        past = [Admission(address, grant, False, 60, open_only=True)]
        for _ in range(3):
            await watched.firewall.apply("one", NAMES_ONLY, past)
            received = download.received
            await asyncio.sleep(0.2)
            assert download.received > received
            assert await run_more(attempt, DENIED) == "errno 111"
        await watched.firewall.apply("one", NAMES_ONLY)
        await task
        assert download.ended == "ConnectionResetError"


async def test_what_a_former_project_had_open_is_not_the_next_ones(world, watched):
    firewall = watched.firewall
    policy = allowlist(rule("all", ALLOWED, protocol=Protocol.ANY))

    def say(data: bytes) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.bind(("", 5555))
            made.connect((ALLOWED, 9999))
            made.settimeout(0.3)
            try:
                made.send(data)
                made.recv(100)
            except OSError:
                pass

    async with echo(world, ALLOWED, 9999) as (got, _):
        for key, rules in (("one", policy), ("two", USUAL)):
            firewall._next_slot = 0
            async with firewall.attach(key, rules) as network, inside(network.namespace) as run:
                assert network.addresses.slot == 0
                await run(say, key.encode())
                await run(say, key.encode())
        assert got == [b"one", b"one"]
