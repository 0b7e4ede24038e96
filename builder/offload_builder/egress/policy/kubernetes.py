"""The same policy for a cluster: NetworkPolicy by address, CiliumNetworkPolicy by name.

What these cannot express of what is allowed is left out, never widened. They cannot deny names or
URLs. All that is missing is named in a comment and in `gaps`.
Sources: kubernetes.io, reference of NetworkPolicy networking.k8s.io/v1; docs.cilium.io, Layer 3
and 4 examples and DNS based policies.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_builder.egress.policy.model import (
    MAX_PORT,
    PROTECTED,
    PROTECTED_V4,
    PROTECTED_V6,
    Action,
    HostTarget,
    Network,
    Policy,
    Posture,
    Protocol,
    Rule,
    opened_networks,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime

KINDS = ("networkpolicy", "cilium")
PATTERN_DEPTH = 3
"""In Cilium a * stands for one label: so many labels below a domain are allowed."""
CILIUM_PORTS = 40
"""Ports that one list may have, by the definition of the object."""
_EVERYTHING: tuple[Network, ...] = (
    ipaddress.ip_network("0.0.0.0/0"),
    ipaddress.ip_network("::/0"),
)
_DNS_PODS = {
    "namespace": {"kubernetes.io/metadata.name": "kube-system"},
    "pod": {"k8s-app": "kube-dns"},
}


@dataclass(frozen=True)
class Manifest:
    """YAML for one cluster.

    Attributes:
        text: one or more documents.
        gaps: what is not in them, one sentence each.
    """

    text: str
    gaps: tuple[str, ...]


def export(
    policy: Policy,
    *,
    kinds: Iterable[str] = KINDS,
    name: str = "offload-egress",
    namespace: str = "",
    pods: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> Manifest:
    """Return a policy as manifests.

    Args:
        policy: of a pool, or merged with a project's.
        kinds: of `KINDS`.
        name: of the objects.
        namespace: of the objects; empty for kubectl's.
        pods: labels of the pods with BuildKit; `app: buildkitd` by default.
        now: rules that have ended by then are left out.
    """
    labels = dict(pods or {"app": "buildkitd"})
    documents: list[str] = []
    gaps: list[str] = []
    for kind in kinds:
        made = _NetworkPolicy(policy, now) if kind == "networkpolicy" else _Cilium(policy, now)
        document = made.document(name, namespace, labels)
        own = list(dict.fromkeys(made.gaps))
        comment = [f"# {document['kind']} made from {policy.source}."]
        comment += [f"# Not in it: {gap}" for gap in own]
        documents.append("\n".join([*comment, *_yaml(document, 0)]))
        gaps += [f"{document['kind']}: {gap}" for gap in own]
    return Manifest("\n---\n".join(documents) + "\n", tuple(gaps))


class _Export:
    """What both kinds of objects have in common."""

    def __init__(self, policy: Policy, now: datetime | None) -> None:
        self.gaps: list[str] = []
        self._open = policy.posture is Posture.OPEN
        rules = policy.rules_at(now)
        self._allowed = [rule for rule in rules if rule.action is Action.ALLOW]
        self._denied = [rule for rule in rules if rule.action is Action.DENY]
        for rule in rules:
            if rule.urls and not (self._open and rule.action is Action.ALLOW and not rule.private):
                shown = ", ".join(str(url) for url in rule.urls[:3])
                more = f" and {len(rule.urls) - 3} more" if len(rule.urls) > 3 else ""
                self._gap(rule, f"{rule.action.value} {shown}{more}: no cluster looks into HTTPS")
            if rule.expires is not None:
                self._gap(rule, f"that it ends at {rule.expires:%Y-%m-%dT%H:%MZ}")

    def _gap(self, rule: Rule, what: str) -> None:
        self.gaps.append(f'{what} (rule "{rule.id}", {rule.place})')

    def _blocks(self, rule: Rule, holes: list[Network]) -> list[dict[str, Any]]:
        return [block for network in rule.networks if (block := _block(network, holes)) is not None]

    def _everything(self, holes: list[Network]) -> list[dict[str, Any]]:
        """Return what the posture "open" allows."""
        found = [_block(network, holes) for network in _EVERYTHING] if self._open else []
        return [block for block in found if block is not None]

    def _holes(self, *, exact: bool) -> list[Network]:
        """Return what deny rules take out of networks.

        Args:
            exact: only those that deny all ports and protocols; others are said elsewhere.
        """
        found: list[Network] = []
        for rule in self._denied:
            whole = not rule.ports and rule.protocol is Protocol.ANY
            if rule.networks and not whole and not exact:
                self._gap(rule, "ports of a deny rule; its addresses are denied as a whole")
            if whole or not exact:
                found.extend(rule.networks)
        return found


class _NetworkPolicy(_Export):
    def document(self, name: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
        """Return the object."""
        holes = self._holes(exact=False)
        for rule in self._denied:
            if rule.hosts:
                self._gap(rule, f"deny {_names(rule)}: NetworkPolicy knows no names")
        self.gaps.append("which names may be looked up: all may, by the DNS of the cluster")
        egress: list[dict[str, Any]] = [self._dns()]
        # An empty list of destinations would stand for all.
        if blocks := self._everything(holes):
            egress.append({"to": [{"ipBlock": block} for block in blocks]})
        for rule in self._allowed:
            egress += self._rule(rule, holes)
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(name, namespace),
            "spec": {
                "podSelector": {"matchLabels": labels},
                "policyTypes": ["Egress"],
                "egress": egress,
            },
        }

    def _dns(self) -> dict[str, Any]:
        return {
            "to": [
                {
                    "namespaceSelector": {"matchLabels": _DNS_PODS["namespace"]},
                    "podSelector": {"matchLabels": _DNS_PODS["pod"]},
                }
            ],
            "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
        }

    def _rule(self, rule: Rule, holes: list[Network]) -> Iterator[dict[str, Any]]:
        if rule.hosts and not (self._open and not rule.private and not rule.via):
            self._gap(rule, f"{_names(rule)}: NetworkPolicy knows no names")
        if rule.protocol is Protocol.ICMP and rule.networks:
            self._gap(rule, "icmp: NetworkPolicy knows TCP and UDP")
            return
        blocks = self._blocks(rule, holes)
        if not blocks:
            return
        item: dict[str, Any] = {"to": [{"ipBlock": block} for block in blocks]}
        if ports := _plain_ports(rule):
            item["ports"] = ports
        yield item


class _Cilium(_Export):
    def document(self, name: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
        """Return the object."""
        egress: list[dict[str, Any]] = list(self._dns())
        holes = self._holes(exact=True)
        if blocks := self._everything(holes):
            egress.append({"toCIDRSet": blocks})
        for rule in self._denied:
            if rule.hosts:
                self._gap(rule, f"deny {_names(rule)}: Cilium cannot deny names")
        for rule in self._allowed:
            egress += self._rule(rule, holes)
        spec: dict[str, Any] = {
            "endpointSelector": {"matchLabels": labels},
            # One empty rule: nothing is allowed. No rule would leave the pods alone.
            "egress": egress or [{}],
        }
        spec["egressDeny"] = list(self._deny())
        return {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": _metadata(name, namespace),
            "spec": spec,
        }

    def _dns(self) -> Iterator[dict[str, Any]]:
        names = [{"matchPattern": "*"}] if self._open else self._patterns(self._allowed)
        if names:
            labels = {"k8s:io.kubernetes.pod.namespace": "kube-system", "k8s:k8s-app": "kube-dns"}
            ports = {"ports": [{"port": "53", "protocol": "ANY"}], "rules": {"dns": names}}
            yield {"toEndpoints": [{"matchLabels": labels}], "toPorts": [ports]}

    def _patterns(self, rules: Iterable[Rule]) -> list[dict[str, str]]:
        named = (rule for rule in rules if not rule.via)
        targets = dict.fromkeys(host for rule in named for host in rule.hosts)
        return [item for target in targets for item in _fqdns(target)]

    def _rule(self, rule: Rule, holes: list[Network]) -> Iterator[dict[str, Any]]:
        if rule.protocol is Protocol.ICMP:
            self._gap(rule, "icmp: Cilium needs its types one by one")
            return
        if rule.via:
            self._gap(rule, f"{_names(rule)}: reached through a connector only")
            return
        if rule.private and rule.hosts:
            self._gap(rule, f"private addresses of {_names(rule)}; allow them by network")
        if not self._open and any(host.wildcard for host in rule.hosts):
            self._gap(rule, f"names more than {PATTERN_DEPTH} labels below a domain")
        ports = _cilium_ports(rule)
        hosts = [] if self._open else self._patterns([rule])
        for key, values in (("toFQDNs", hosts), ("toCIDRSet", self._blocks(rule, holes))):
            if values:
                item: dict[str, Any] = {key: values}
                if ports:
                    item["toPorts"] = ports
                yield item

    def _deny(self) -> Iterator[dict[str, Any]]:
        """Deny wins in Cilium too; protected ranges are denied but for what rules open."""
        opened = [
            part
            for rule in self._allowed
            for network in rule.networks
            for part in opened_networks(network)
        ]
        networks: list[Network] = [
            network
            for ranges in (PROTECTED_V4, PROTECTED_V6)
            for network in ipaddress.collapse_addresses(
                item.network
                for item in ranges  # type: ignore[type-var]
            )
        ]
        blocks: list[dict[str, Any]] = []
        for network in networks:
            block: dict[str, Any] = {"cidr": str(network)}
            if holes := [str(item) for item in opened if within(item, network)]:
                block["except"] = holes
            if block.get("except") != [str(network)]:
                blocks.append(block)
        yield {"toCIDRSet": blocks}
        for rule in self._denied:
            if rule.networks:
                item: dict[str, Any] = {"toCIDR": [str(network) for network in rule.networks]}
                if rule.protocol is Protocol.ICMP:
                    self._gap(rule, "that icmp alone is denied; its addresses are, as a whole")
                elif ports := _cilium_ports(rule):
                    item["toPorts"] = ports
                yield item


def _block(network: Network, holes: list[Network]) -> dict[str, Any] | None:
    """Return a network without what is denied in it; None when nothing is left."""
    if any(within(network, hole) for hole in holes):
        return None
    inner = [hole for hole in holes if within(hole, network)]
    inner += [
        item.network
        for item in PROTECTED
        if within(item.network, network) and item.network != network
    ]
    block: dict[str, Any] = {"cidr": str(network)}
    if inner:
        block["except"] = [str(item) for item in ipaddress.collapse_addresses(inner)]  # type: ignore[type-var]
    return block


def _plain_ports(rule: Rule) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for protocol in _protocols(rule):
        if not rule.ports:
            found.append({"protocol": protocol})
        for ports in rule.ports:
            item: dict[str, Any] = {"protocol": protocol, "port": ports.first}
            if ports.last != ports.first:
                item["endPort"] = ports.last
            found.append(item)
    return found


def _cilium_ports(rule: Rule) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for protocol in _protocols(rule):
        if not rule.ports:
            found.append({"port": "1", "endPort": MAX_PORT, "protocol": protocol})
        for ports in rule.ports:
            item: dict[str, Any] = {"port": str(ports.first)}
            if ports.last != ports.first:
                item["endPort"] = ports.last
            found.append({**item, "protocol": protocol})
    return [
        {"ports": found[begin : begin + CILIUM_PORTS]}
        for begin in range(0, len(found), CILIUM_PORTS)
    ]


def _protocols(rule: Rule) -> tuple[str, ...]:
    """Return the protocols that must be named; none where all are meant."""
    if rule.protocol is Protocol.ANY:
        return ("TCP", "UDP") if rule.ports else ()
    return (rule.protocol.value.upper(),)


def _fqdns(target: HostTarget) -> list[dict[str, str]]:
    if not target.wildcard:
        return [{"matchName": target.name}]
    stars = ["*." * depth + target.name for depth in range(1, PATTERN_DEPTH + 1)]
    return [{"matchPattern": pattern} for pattern in stars]


def _names(rule: Rule) -> str:
    shown = ", ".join(str(host) for host in rule.hosts[:3])
    return f"{shown} and {len(rule.hosts) - 3} more" if len(rule.hosts) > 3 else shown


def _metadata(name: str, namespace: str) -> dict[str, str]:
    return {"name": name, **({"namespace": namespace} if namespace else {})}


def _yaml(value: Any, depth: int) -> list[str]:
    """Return lines of YAML; texts are quoted as in JSON, which is YAML too."""
    indent = "  " * depth
    lines: list[str] = []
    entries = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in entries:
        head = f"{indent}{_key(key)}:" if key is not None else f"{indent}-"
        if isinstance(item, (dict, list)) and item:
            nested = _yaml(item, depth + 1)
            if key is None:
                # The first line of an element stands behind its dash.
                lines.append(f"{indent}- {nested[0].lstrip()}")
                lines += nested[1:]
            else:
                lines += [head, *nested]
        else:
            lines.append(f"{head} {json.dumps(item)}")
    return lines


def _key(key: str) -> str:
    return key if key.isalnum() else json.dumps(key)
