"""From the rules of a policy to elements of nft sets that do not overlap.

A set of ranges refuses elements that overlap with each other, and rules of people do overlap. So
the ports are cut where any rule begins or ends; within one piece the networks are merged.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import MAX_PORT, PortRange, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_builder.egress.policy.model import Network, Rule

ICMP_NAMES = {4: "icmp", 6: "ipv6-icmp"}
_ALL_PROTOCOLS = "0-255"
_Prefix = tuple[int, int]
"""First address and length of a network."""
_BITS = {4: 32, 6: 128}
_ADDRESSES = {4: ipaddress.IPv4Address, 6: ipaddress.IPv6Address}


@dataclass
class Matches:
    """What some rules match, by network.

    Attributes:
        ports: (protocol, ports, network) of rules that name ports; the protocol is tcp or udp.
        whole: (protocol, network) of rules for all ports; the protocol may be `ANY`.
    """

    ports: list[tuple[str, PortRange, Network]] = field(default_factory=list)
    whole: list[tuple[Protocol, Network]] = field(default_factory=list)

    def add(self, rule: Rule, networks: Iterable[Network]) -> None:
        """Add what a rule says of some networks."""
        for network in networks:
            if not rule.ports:
                self.whole.append((rule.protocol, network))
                continue
            for protocol in transport_names(rule.protocol):
                self.ports += [(protocol, ports, network) for ports in rule.ports]

    def port_elements(self, version: int) -> list[str]:
        """Return elements of a set `address . protocol . port` for IPv4 or IPv6."""
        found = []
        for protocol in ("tcp", "udp"):
            mine = [
                (ports, network)
                for name, ports, network in self.ports
                if name == protocol and network.version == version
            ]
            for network, ports in _disjoint(mine, version):
                found.append(f"{network} . {protocol} . {ports}")
        return found

    def whole_elements(self, version: int) -> list[str]:
        """Return elements of a set `address . protocol` for IPv4 or IPv6."""
        mine = [(protocol, net) for protocol, net in self.whole if net.version == version]
        everything = collapse(net for protocol, net in mine if protocol is Protocol.ANY)
        found = [f"{network} . {_ALL_PROTOCOLS}" for network in everything]
        for protocol in (Protocol.TCP, Protocol.UDP, Protocol.ICMP):
            name = ICMP_NAMES[version] if protocol is Protocol.ICMP else protocol.value
            networks = collapse(net for one, net in mine if one is protocol)
            left = [part for network in networks for part in _subtract(network, everything)]
            found += [f"{network} . {name}" for network in left]
        return found


def transport_names(protocol: Protocol) -> tuple[str, ...]:
    """Return the protocols with ports that a rule means, as nft names them."""
    if protocol is Protocol.ANY:
        return ("tcp", "udp")
    return () if protocol is Protocol.ICMP else (protocol.value,)


def collapse(networks: Iterable[Network]) -> list[Network]:
    """Return networks without those that lie in others, neighbours merged; IPv4 first."""
    by_version: dict[int, list[_Prefix]] = {4: [], 6: []}
    for network in networks:
        by_version[network.version].append(_prefix(network))
    v4, v6 = (_collapse(some, _BITS[version]) for version, some in by_version.items())
    return [*map(ipaddress.IPv4Network, v4), *map(ipaddress.IPv6Network, v6)]


def _prefix(network: Network) -> _Prefix:
    return int(network.network_address), network.prefixlen


def _collapse(prefixes: Iterable[_Prefix], bits: int) -> list[_Prefix]:
    """Return prefixes of one family without those that lie in others, two halves made one.

    With numbers, as `ipaddress.collapse_addresses` takes a second for some ten thousand.
    """
    kept: list[_Prefix] = []
    for first, length in sorted(prefixes):
        if kept:
            # Whatever begins no earlier and is no larger lies in it, or behind it.
            last, wide = kept[-1]
            if first >> (bits - wide) == last >> (bits - wide):
                continue
        kept.append((first, length))
        while len(kept) > 1:
            (one, wide), (other, narrow) = kept[-2:]
            if wide != narrow or one ^ other != 1 << (bits - wide):
                break
            kept[-2:] = [(one, wide - 1)]
    return kept


def _disjoint(
    rules: Sequence[tuple[PortRange, Network]], version: int
) -> list[tuple[str, PortRange]]:
    """Return networks with ports, of which no two have an address and a port in common."""
    starts = sorted({ports.first for ports, _ in rules} | {ports.last + 1 for ports, _ in rules})
    by_ports: dict[PortRange, set[_Prefix]] = defaultdict(set)
    for ports, network in rules:
        by_ports[ports].add(_prefix(network))
    open_pieces: dict[_Prefix, PortRange] = {}
    found: list[tuple[_Prefix, PortRange]] = []
    for index, first in enumerate(starts):
        last = starts[index + 1] - 1 if index + 1 < len(starts) else MAX_PORT
        prefixes: set[_Prefix] = set()
        for ports, some in by_ports.items():
            if ports.first <= first and last <= ports.last:
                prefixes |= some
        piece = _collapse(prefixes, _BITS[version])
        joined: dict[_Prefix, PortRange] = {}
        for prefix in piece:
            before = open_pieces.pop(prefix, None)
            joined[prefix] = PortRange(before.first if before else first, last)
        found += open_pieces.items()
        open_pieces = joined
    address = _ADDRESSES[version]
    return [
        (f"{address(start)}/{length}", ports)
        for (start, length), ports in (*found, *open_pieces.items())
    ]


def _subtract(network: Network, holes: Sequence[Network]) -> list[Network]:
    """Return what is left of a network without others of its family."""
    left: list[Network] = [network]
    for hole in holes:
        pieces: list[Network] = []
        for part in left:
            if not part.overlaps(hole):
                pieces.append(part)
            elif part.prefixlen < hole.prefixlen:
                # mypy cannot know that both are of one family.
                pieces += part.address_exclude(hole)  # type: ignore[arg-type]
        left = pieces
    return left
