"""Rules become elements of sets that match the same and never overlap."""

from __future__ import annotations

import ipaddress
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.firewall.elements import Matches, collapse
from offload_builder.egress.policy.model import (
    Action,
    NetworkTarget,
    PortRange,
    Protocol,
    Rule,
)

ADDRESSES = [ipaddress.ip_address(f"203.0.113.{number}") for number in range(8)]
NETWORKS = [
    ipaddress.ip_network(f"203.0.113.{start}/{bits}")
    for bits in (29, 30, 31, 32)
    for start in range(0, 8, 1 << (32 - bits))
]
NUMBERS = {"tcp": 6, "udp": 17, "icmp": 1}


@st.composite
def rules(draw) -> Rule:
    first = draw(st.integers(1, 12))
    ports = st.builds(lambda length: PortRange(first, first + length), st.integers(0, 6))
    protocol = draw(st.sampled_from(list(Protocol)))
    networks = draw(st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3))
    some = [] if protocol is Protocol.ICMP else draw(st.lists(ports, max_size=2))
    return Rule("r", Action.ALLOW, tuple(map(NetworkTarget, networks)), tuple(some), protocol)


def parsed(element: str) -> tuple[ipaddress.IPv4Network, range, range]:
    network, protocol, *ports = element.split(" . ")
    first, _, last = (ports or ["0-65535"])[0].partition("-")
    protocols = (
        range(256) if protocol == "0-255" else range(NUMBERS[protocol], NUMBERS[protocol] + 1)
    )
    return ipaddress.IPv4Network(network), protocols, range(int(first), int(last or first) + 1)


def crossing(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


@given(st.lists(rules(), max_size=6))
def test_elements_match_what_the_rules_match_and_do_not_overlap(some):
    matches = Matches()
    for rule in some:
        matches.add(rule, rule.networks)
    sets = [
        [parsed(element) for element in elements]
        for elements in (matches.port_elements(4), matches.whole_elements(4))
    ]
    for elements in sets:
        for one, other in combinations(elements, 2):
            assert not (
                one[0].overlaps(other[0])
                and crossing(one[1], other[1])
                and crossing(one[2], other[2])
            )
    for address in ADDRESSES:
        for protocol, number in NUMBERS.items():
            for port in range(1, 20) if protocol != "icmp" else [None]:
                wanted = any(
                    any(address in network for network in rule.networks)
                    and rule.speaks(Protocol(protocol), port)
                    for rule in some
                )
                found = any(
                    address in network and number in protocols and (port or 0) in ports
                    for elements in sets
                    for network, protocols, ports in elements
                )
                assert found == wanted, (address, protocol, port)


@st.composite
def networks_v6(draw) -> ipaddress.IPv6Network:
    bits = draw(st.sampled_from([0, 1, 119, 120, 124, 126, 127, 128]))
    start = int(ipaddress.ip_address("2001:db8::")) + draw(st.integers(0, 511))
    return ipaddress.IPv6Network((start >> (128 - bits) << (128 - bits), bits))


@given(st.lists(networks_v6(), max_size=30), st.lists(st.sampled_from(NETWORKS), max_size=10))
def test_networks_are_merged_as_the_standard_library_does(v6, v4):
    expected = [*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)]
    assert collapse([*v6, *v4]) == expected
