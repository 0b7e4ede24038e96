"""Ways around the firewall for somebody with all rights in a project's own namespace.

That is what a step with `security.insecure` and `network.host` is, or a BuildKit that was taken
over. Whether something leaked is judged by the packets that came out of the router.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
import subprocess

import pytest

from offload_builder.egress.firewall import links
from offload_builder.egress.policy.model import Protocol
from tests.fixtures.bypasslab import Outcome
from tests.fixtures.egressworld import (
    ALLOWED,
    ALLOWED6,
    DENIED,
    DENIED6,
    USUAL,
    attempt,
    inside,
    open_policy,
    rule,
)
from tests.fixtures.packettap import PacketTap
from tests.fixtures.rawpackets import (
    ICMP,
    ICMP6,
    TCP,
    UDP,
    claim,
    datagram,
    ipv4,
    ipv6,
    mac_of,
    message4,
    message6,
    segment,
    send_frames,
)

OWN, OWN6 = "100.64.0.2", "fd6f:626c::2"
OTHER, OTHER6 = "100.64.16.2", "fd6f:626c:1::2"
EVERYTHING = open_policy(rule("all", "0.0.0.0/0", "::/0", protocol=Protocol.ANY))
LOOSE = b"\x83\x07\x04" + bytes(map(int, DENIED.split("."))) + b"\0"
STRICT = b"\x89" + LOOSE[1:]
SYN, ACK = 2, 16


def routed6(kind: int) -> bytes:
    """A routing header that names another place, before a datagram to an allowed one."""
    head = struct.pack("!BBBBI", UDP, 2, kind, 1, 0)
    return head + ipaddress.IPv6Address(DENIED6).packed + datagram(OWN6, ALLOWED6, 80)


WHOLE = datagram(OWN, DENIED, 53, b"leak" * 16)
INNER = ipv4(OWN, DENIED, UDP, datagram(OWN, DENIED, 53))
WAYS = {
    "udp-frame": [ipv4(OWN, DENIED, UDP, datagram(OWN, DENIED, 53))],
    "udp-frame-ipv6": [ipv6(OWN6, DENIED6, UDP, datagram(OWN6, DENIED6, 53))],
    "syn-frame": [ipv4(OWN, DENIED, TCP, segment(OWN, DENIED, 80, SYN))],
    "middle-of-a-connection": [ipv4(OWN, DENIED, TCP, segment(OWN, DENIED, 80, ACK, b"leak"))],
    "no-flags": [ipv4(OWN, DENIED, TCP, segment(OWN, DENIED, 80, 0, b"leak"))],
    "echo": [ipv4(OWN, DENIED, ICMP, message4(8, 0, b"\0\1\0\1leak"))],
    "echo-ipv6": [ipv6(OWN6, DENIED6, ICMP6, message6(OWN6, DENIED6, 128, b"\0\1\0\1leak"))],
    "icmp-error": [ipv4(OWN, DENIED, ICMP, message4(3, 4, b"\0\0\5\0" + INNER))],
    "forwarded-neighbour-discovery": [
        ipv6(OWN6, DENIED6, ICMP6, message6(OWN6, DENIED6, 135, b"\0" * 4 + b"leak" * 4), 255)
    ],
    "tunnel-ipip": [ipv4(OWN, DENIED, 4, INNER)],
    "tunnel-6in4": [ipv4(OWN, DENIED, 41, ipv6(OWN6, DENIED6, UDP, b"leak"))],
    "tunnel-gre": [ipv4(OWN, DENIED, 47, b"\0\0\x08\0" + INNER)],
    "sctp": [ipv4(OWN, DENIED, 132, b"\x15\xb3\0\x35" + b"leak" * 4)],
    "fragments": [
        ipv4(OWN, DENIED, UDP, WHOLE[:24], fragment=0x2000),
        ipv4(OWN, DENIED, UDP, WHOLE[24:], fragment=3),
    ],
    "fragment-without-beginning": [ipv4(OWN, DENIED, UDP, b"leak" * 4, fragment=3)],
    "invented-source": [ipv4("203.0.113.77", ALLOWED, UDP, datagram("203.0.113.77", ALLOWED, 80))],
    "neighbours-source": [ipv4(OTHER, ALLOWED, TCP, segment(OTHER, ALLOWED, 80, SYN))],
    "neighbours-source-ipv6": [ipv6(OTHER6, ALLOWED6, TCP, segment(OTHER6, ALLOWED6, 80, SYN))],
    "routers-source": [ipv4("100.64.0.1", ALLOWED, TCP, segment("100.64.0.1", ALLOWED, 80, SYN))],
    "loopback-source": [ipv4("127.0.0.1", ALLOWED, TCP, segment("127.0.0.1", ALLOWED, 80, SYN))],
    "link-local-source": [ipv6("fe80::1", DENIED6, UDP, datagram("fe80::1", DENIED6, 53))],
    "loose-source-route": [ipv4(OWN, ALLOWED, UDP, datagram(OWN, ALLOWED, 80), options=LOOSE)],
    "strict-source-route": [ipv4(OWN, ALLOWED, UDP, datagram(OWN, ALLOWED, 80), options=STRICT)],
    "routing-header-0": [ipv6(OWN6, ALLOWED6, 43, routed6(0))],
    "routing-header-4": [ipv6(OWN6, ALLOWED6, 43, routed6(4))],
    "host-loopback": [ipv4(OWN, "127.0.0.1", TCP, segment(OWN, "127.0.0.1", 7450, SYN))],
    "host-loopback-ipv6": [ipv6(OWN6, "::1", TCP, segment(OWN6, "::1", 7450, SYN))],
}  # fmt: skip


async def sent(watched, network, packets: list[bytes]) -> None:
    target = await mac_of(watched.firewall.router.inside, network.addresses.device)
    async with inside(network.namespace) as run:
        await run(attempt, ALLOWED)
        await run(send_frames, "eth0", target, packets)
        # What was sent before has passed, or has not, when this is through.
        await run(attempt, ALLOWED)
        await run(attempt, ALLOWED6)


async def test_no_frame_that_can_be_made_gets_out(world, watched) -> None:
    async with (
        watched.firewall.attach("one", USUAL) as one,
        watched.firewall.attach("two", USUAL),
        PacketTap(world.machine) as tap,
    ):
        for name, packets in WAYS.items():
            before = len(tap.to(ALLOWED)), len(tap.to(ALLOWED6))
            await sent(watched, one, packets)
            assert tap.others((ALLOWED, 80), (ALLOWED6, 80)) == [], name
            after = len(tap.to(ALLOWED)), len(tap.to(ALLOWED6))
            assert after[0] > before[0], name
    clients = {client for _, client in world.requests}
    assert len(clients) <= 2, clients


async def test_these_frames_would_get_out_if_the_policy_allowed_it(world, watched) -> None:
    arrives = {name: packets for name, packets in WAYS.items() if "source" not in name}
    async with (
        watched.firewall.attach("one", EVERYTHING) as one,
        PacketTap(world.machine) as tap,
    ):
        for name in ("udp-frame", "udp-frame-ipv6", "syn-frame", "echo", "echo-ipv6", "fragments",
                     "tunnel-ipip", "tunnel-6in4", "tunnel-gre"):  # fmt: skip
            before = len(tap.others((ALLOWED, 80), (ALLOWED6, 80)))
            await sent(watched, one, arrives[name])
            assert len(tap.others((ALLOWED, 80), (ALLOWED6, 80))) > before, name
        seen = len(tap.seen)
        for name in ("loose-source-route", "routing-header-0", "forwarded-neighbour-discovery",
                     "host-loopback", "host-loopback-ipv6"):  # fmt: skip
            await sent(watched, one, WAYS[name])
            assert all(one.protocol == TCP for one in tap.seen[seen:]), name


async def test_claiming_addresses_on_the_link_takes_nothing_from_neighbours(world, watched) -> None:
    async with (
        watched.firewall.attach("one", USUAL) as one,
        watched.firewall.attach("two", USUAL) as two,
        inside(one.namespace) as run_one,
        inside(two.namespace) as run_two,
    ):
        uplink = [str(a) for a in await world.machine.run(links.local_addresses)]
        others = [
            two.addresses.daemon_v4, two.addresses.gateway_v4, two.addresses.daemon_v6,
            two.addresses.gateway_v6, one.addresses.gateway_v4, ALLOWED, ALLOWED6, *uplink,
        ]  # fmt: skip
        for _ in range(3):
            await run_one(claim, "eth0", others)
            await asyncio.sleep(0.05)
            for host in (ALLOWED, ALLOWED6):
                assert await run_two(attempt, host) == f"hello from {host}"
                assert await run_one(attempt, host) == f"hello from {host}"
        stolen = await watched.firewall.router.inside.run(_neighbours, "p1")
        assert not set(others[4:]) & set(stolen)
        assert stolen.get(two.addresses.daemon_v4, "") != (await _own_mac(one))


async def _own_mac(network) -> str:
    async with inside(network.namespace) as run:
        return await run(
            lambda: (
                subprocess.run(
                    ["cat", "/proc/net/arp"], capture_output=True, text=True, check=True
                ).stdout
            )
        )


def _neighbours(device: str) -> dict[str, str]:
    done = subprocess.run(
        ["ip", "neigh", "show", "dev", device], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[row.index("lladdr") + 1] for row in rows if "lladdr" in row}


async def test_the_machines_loopback_is_not_reached_through_the_link(world, watched) -> None:
    await world.serve(world.machine, "127.0.0.1", 9100)
    async with watched.firewall.attach("one", EVERYTHING) as one, inside(one.namespace) as run:
        gateway = one.addresses.gateway_v4
        await run(links.write_setting, "ipv4/conf/all/route_localnet", "1")
        await run(
            links.run_ip,
            ["address del 127.0.0.1/8 dev lo", f"route add 127.0.0.1/32 via {gateway} dev eth0"],
        )
        assert not (await run(attempt, "127.0.0.1", 9100, 0.5)).startswith("hello")
        assert not (await run(attempt, "127.0.0.1", 7450, 0.5)).startswith("hello")
    assert world.requests == []


@pytest.mark.parametrize("kind", ["host", "insecure"])
def test_rights_change_nothing_about_what_is_reached(outcome: Outcome, kind: str) -> None:
    def class_of(result: str) -> str:
        return result.split()[0]

    plain = {place: class_of(result) for place, result in outcome.results["step"].items()}
    with_rights = {place: class_of(result) for place, result in outcome.results[kind].items()}
    registry = f"tcp:{outcome.places['GATEWAY']}:{outcome.places['OWNREGISTRY']}"
    assert with_rights.pop(registry) == "ok"  # It answers nobody without the secret of a build.
    assert plain.pop(registry) == "refused"
    assert with_rights == plain


def test_a_step_with_all_rights_has_really_flushed_the_rules_it_sees(outcome: Outcome) -> None:
    _, _, printed = outcome.printed.partition("begin-insecure")
    before, _, after = printed.partition("flushed")
    assert "chain forward" in before
    assert after
    assert "table" not in after.split("http:")[0]
