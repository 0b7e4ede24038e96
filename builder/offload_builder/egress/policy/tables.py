"""Finds the rules that mean a host or an address, in a time that does not grow with the rules."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import (
    HostTarget,
    NetworkTarget,
    Rule,
    Target,
    normal_host,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from offload_builder.egress.policy.model import Address
    from offload_builder.egress.policy.weburl import UrlTarget, WebUrl

_BITS = {4: 32, 6: 128}


class TargetTable:
    """Rules by their targets. Rules are found in no certain order."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        """Sort rules into tables; they keep their targets only."""
        self._exact: dict[str, list[Rule]] = {}
        self._below: dict[str, list[Rule]] = {}
        self._networks: dict[int, dict[int, dict[int, list[Rule]]]] = {4: {}, 6: {}}
        self._urls: dict[str, list[tuple[UrlTarget, Rule]]] = {}
        for rule in rules:
            for target in rule.targets:
                self._add(target, rule)

    def _add(self, target: Target, rule: Rule) -> None:
        if isinstance(target, HostTarget):
            table = self._below if target.wildcard else self._exact
            table.setdefault(target.name, []).append(rule)
            return
        if not isinstance(target, NetworkTarget):
            self._urls.setdefault(target.name, []).append((target, rule))
            return
        network = target.network
        lengths = self._networks[network.version].setdefault(network.prefixlen, {})
        lengths.setdefault(int(network.network_address), []).append(rule)

    def of_host(self, host: str) -> Iterator[Rule]:
        """Yield the rules that name a host, or a domain above it."""
        name = normal_host(host)
        yield from self._exact.get(name, ())
        while "." in name:
            name = name.partition(".")[2]
            yield from self._below.get(name, ())

    def of_server(self, url: WebUrl) -> Iterator[tuple[UrlTarget, Rule]]:
        """Yield the rules by URL that name something of the server of a URL."""
        for target, rule in self._urls_above(url.host):
            if target.names_server(url):
                yield target, rule

    def of_address(self, address: Address) -> Iterator[Rule]:
        """Yield the rules with a network that has an address."""
        yield from self._within(int(address), address.version, _BITS[address.version])

    def covering(self, target: Target) -> Iterator[Rule]:
        """Yield the rules with a target that means all that this one does."""
        if isinstance(target, NetworkTarget):
            network = target.network
            first = ipaddress.ip_address(network.network_address)
            yield from self._within(int(first), network.version, network.prefixlen)
        elif not isinstance(target, HostTarget):
            yield from self.covering(HostTarget(target.name, target.wildcard))
            for one, rule in self._urls_above(target.name):
                if one.covers(target):
                    yield rule
        elif target.wildcard:
            # What covers one name below the domain, whichever, covers all.
            yield from self._below.get(target.name, ())
            name = target.name
            while "." in name:
                name = name.partition(".")[2]
                yield from self._below.get(name, ())
        else:
            yield from self.of_host(target.name)

    def _urls_above(self, host: str) -> Iterator[tuple[UrlTarget, Rule]]:
        name = host
        while name:
            yield from self._urls.get(name, ())
            name = name.partition(".")[2]

    def _within(self, address: int, family: int, longest: int) -> Iterator[Rule]:
        bits = _BITS[family]
        for length, table in self._networks[family].items():
            if length <= longest:
                shift = bits - length
                yield from table.get(address >> shift << shift, ())
