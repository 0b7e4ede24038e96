"""A policy as connections and lookups of names know it: hosts, addresses and ports, but no URLs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import Action, HostTarget, PortRange, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload_builder.egress.policy.model import Policy, Rule


def as_connections(policy: Policy) -> Policy:
    """Return a policy with hosts and ports in place of URLs.

    The server of an allowed URL can be reached as a whole: whoever looks at URLs has to stand
    before it. A denied URL denies nothing of its server.
    """
    if not any(rule.urls for rule in policy.rules):
        return policy
    return replace(policy, rules=tuple(part for rule in policy.rules for part in _parts(rule)))


def without_urls(policy: Policy) -> Policy:
    """Return a policy without its rules by URL."""
    return replace(policy, rules=tuple(rule for rule in policy.rules if not rule.urls))


def allows_urls(policy: Policy) -> bool:
    """Return whether a server may be reached for some of its URLs only."""
    return any(rule.urls and rule.action is Action.ALLOW for rule in policy.rules_at())


def _parts(rule: Rule) -> Iterator[Rule]:
    if not rule.urls:
        yield rule
        return
    if rule.action is Action.DENY:
        return
    by_port: dict[int, dict[HostTarget, None]] = defaultdict(dict)
    for url in rule.urls:
        by_port[url.port][HostTarget(url.name, url.wildcard)] = None
    for port, hosts in sorted(by_port.items()):
        ports = (PortRange(port, port),)
        yield replace(rule, targets=tuple(hosts), ports=ports, protocol=Protocol.TCP)
