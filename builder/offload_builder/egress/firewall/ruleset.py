"""The rules of a router as text for nft: one table, and in it a set of chains per project.

A packet of a project passes, in this order:

1. `spoof`: its source must be an address of the project, and it may name no way of its own.
2. `forward`: what belongs to a connection that the policy in force has allowed passes. Which policy
   that was is the connection's mark. After a change every open connection is judged once more, at
   its next packet in either direction: those that are still allowed go on, others are cut.
3. the project's chain: other projects and the node, denied networks, opened protected networks,
   addresses that allowed names led to, protected ranges, allowed networks, the posture. It looks
   where a connection was begun to, so packets of the other side are judged by it as well.

Each decision for a new connection is counted, and logged up to a rate: the log has the project's
slot and the stage that decided, and the policy tells which rule that was. Networks are elements of
sets, so ten thousand of them cost a connection what one does. Nothing here does anything: see
`router` for who applies it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.egress.firewall.addresses import CONNECTED, UPLINK_DEVICE
from offload_builder.egress.firewall.elements import Matches, collapse
from offload_builder.egress.policy.model import (
    PROTECTED,
    Action,
    Posture,
    opened_networks,
    opened_range,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_builder.egress.firewall.addresses import ProjectAddresses
    from offload_builder.egress.policy.model import Address, EffectivePolicy, Network, Policy

TABLE = "inet offload_build"
LOG_GROUP = 7
CLAIM_GROUP = 8
"""The first one; each project has one of its own, so that none can fill the queue of another."""
CLAIM_WORD = "claim"
REFUSED_MARK = 0xFFFFFFFE
"""Mark of a connection that asked for a name that it may not reach."""
LOG_PREFIX = "offload"
_LOG = f"limit rate 100/second burst 200 packets log prefix {{}} group {LOG_GROUP}"
_NEW_NAMED_LIMIT = "limit rate over 1000/second burst 5000 packets"
_FIRST_BYTES_LIMIT = "limit rate over 2000/second burst 10000 packets"
"""What of a project the agent has to look at; senders repeat what is beyond it."""
MAX_CONNECTIONS = 32_768
"""Of a project that are open at a time; the kernel's table, 262,144 as a rule, is everybody's."""
NAMES_SIZE = 65_536
OWN_MARK = 0x6F62
"""Mark of packets that the agent makes in the name of a server."""
_CUT = 0xFFFFFFFF
"""Mark of a connection whose project has been told that it has ended."""
_FAMILIES = {4: ("ip", "ipv4_addr"), 6: ("ip6", "ipv6_addr")}
_PORTED = (
    "meta l4proto {{ tcp, udp }} ct original {ip} daddr . meta l4proto . ct original proto-dst"
    " @{set} goto {target}"
)
_WHOLE = "ct original {ip} daddr . meta l4proto @{set} goto {target}"


class Stage(enum.Enum):
    """What decided about a new connection."""

    ALLOWED = "allowed"
    NEIGHBOUR = "neighbour"
    NODE = "node"
    DENIED = "denied"
    PROTECTED = "protected"
    NAME = "name"
    DEFAULT = "default"
    CONNECTOR = "connector"


REFUSALS = tuple(stage for stage in Stage if stage is not Stage.ALLOWED)


@dataclass(frozen=True, slots=True)
class InForce:
    """The policy that a project has in the kernel.

    Attributes:
        layers: number of its chains.
        mark: of the connections that it has allowed; no two policies of a router have the same.
    """

    layers: int = 0
    mark: int = 0


NOTHING = InForce()
"""What a project has that has no policy yet."""


def base_table(*, node_addresses: Iterable[Address]) -> str:
    """Return the table without any project; applied, it replaces what is there.

    Args:
        node_addresses: of the machine, which no project reaches.
    """
    hard = _block_sets("hard", [item.network for item in PROTECTED])
    return f"""add table {TABLE}
delete table {TABLE}
table {TABLE} {{
{hard}{_empty_sets("node")}
  set current {{
    type ifname . mark
  }}
  map spoof_of {{
    type ifname : verdict
  }}
  map forward_of {{
    type ifname : verdict
  }}
  map input_of {{
    type ifname : verdict
  }}
  chain reject_it {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain cut {{
    ct mark {_CUT} goto reject_it
    meta l4proto != tcp goto reject_it
    ct mark set {_CUT}
    tcp flags set rst accept
  }}
{_empty_segments()}  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    ip hdrlength != 5 drop
    exthdr rt exists drop
    iifname vmap @spoof_of
    iifname != {{ "lo", "{UPLINK_DEVICE}" }} drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established iifname . ct mark @current accept
    ct state established oifname . ct mark @current accept
    ct state related meta l4proto {{ icmp, ipv6-icmp }} iifname . ct mark @current accept
    ct state related meta l4proto {{ icmp, ipv6-icmp }} oifname . ct mark @current accept
    ct state {{ invalid, related, untracked }} drop
    iifname vmap @forward_of
    ct state established oifname vmap @forward_of
    iifname != "{UPLINK_DEVICE}" goto reject_it
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established accept
    ct state related meta l4proto {{ icmp, ipv6-icmp }} accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept
    iifname vmap @input_of
    iifname != "{UPLINK_DEVICE}" goto reject_it
  }}
  chain own {{
    type filter hook output priority raw; policy accept;
    meta mark {OWN_MARK} notrack
  }}
  chain hide {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{UPLINK_DEVICE}" masquerade
  }}
}}
{node_elements(node_addresses)}"""


def node_elements(addresses: Iterable[Address]) -> str:
    """Return the change after which just these are the machine's addresses."""
    lines = [f"flush set {TABLE} node4", f"flush set {TABLE} node6"]
    for version in _FAMILIES:
        some = sorted({str(one) for one in addresses if one.version == version})
        if some:
            lines.append(_add(f"node{version}", some))
    return "\n".join(lines) + "\n"


def add_project(project: ProjectAddresses) -> str:
    """Return the change that lets a project in; until it has a policy, everything is refused."""
    name, device = project.device, project.device
    return f"""{_counters(name)}table {TABLE} {{
  set {name}_served {{
    type ipv4_addr . inet_service
  }}
  chain {name}_spoof {{
    ip saddr {{ {project.daemon_v4}, {project.steps_v4} }} accept
    ip6 saddr {{ {project.daemon_v6}, {project.steps_v6}, fe80::/64, :: }} accept
    drop
  }}
  chain {name}_forward {{
  }}
{_refusing_chains(project)}  chain {name}_input {{
    ip daddr {project.gateway_v4} udp dport 53 accept
    ip daddr {project.gateway_v4} tcp dport 53 accept
    ip daddr . tcp dport @{name}_served goto {name}_{Stage.ALLOWED.value}
    ip daddr {CONNECTED} goto {name}_{Stage.CONNECTOR.value}
    goto {name}_{Stage.NODE.value}
  }}
  chain {name}_forward {{
    goto {name}_{Stage.DEFAULT.value}
  }}
}}
add element {TABLE} spoof_of {{ "{device}" : goto {name}_spoof }}
add element {TABLE} forward_of {{ "{device}" : goto {name}_forward }}
add element {TABLE} input_of {{ "{device}" : goto {name}_input }}
"""


def open_registry(project: ProjectAddresses, port: int) -> str:
    """Return the change that lets a project's BuildKit reach a port of its gateway address."""
    return (
        f"insert rule {TABLE} {project.device}_input ip saddr {project.daemon_v4}"
        f" ip daddr {project.gateway_v4} tcp dport {port} accept\n"
    )


def serve_connected(project: ProjectAddresses, doors: Iterable[tuple[Address, int]]) -> str:
    """Return the change after which just these addresses and ports of connectors are reached."""
    some = [f"{address} . {port}" for address, port in doors]
    lines = [f"flush set {TABLE} {project.device}_served"]
    if some:
        lines.append(_add(f"{project.device}_served", some))
    return "\n".join(lines) + "\n"


def remove_project(project: ProjectAddresses, before: InForce) -> str:
    """Return the change that takes a project and its policy out."""
    name, device = project.device, project.device
    chains = ["spoof", "forward", "input", "named", *(stage.value for stage in Stage)]
    lines = [
        f'delete element {TABLE} {of} {{ "{device}" }}'
        for of in ("spoof_of", "forward_of", "input_of")
    ]
    if before.layers:
        lines.append(f'delete element {TABLE} current {{ "{name}" . {before.mark} }}')
    lines += [f"flush chain {TABLE} {name}_{chain}" for chain in chains]
    lines += _forget(policy_name(project, before.mark), before.layers)
    lines += [f"delete chain {TABLE} {name}_{chain}" for chain in chains]
    lines.append(f"delete set {TABLE} {name}_served")
    lines += [f"delete counter {TABLE} {name}_{stage.value}" for stage in Stage]
    return "\n".join(lines) + "\n"


def prepare_policy(project: ProjectAddresses, policy: EffectivePolicy, mark: int) -> str:
    """Return the change that writes a policy down, without effect until `switch_policy`.

    A change of its own, because the kernel looks into new sets of networks a moment later than into
    new chains: in between, nothing would be allowed by them, and nothing denied.

    Args:
        project: whose.
        policy: to be prepared.
        mark: of the connections that it will allow.
    """
    name, own = project.device, policy_name(project, mark)
    lines = [f"table {TABLE} {{", _names_sets(own), _names_sets(past(own)), "}"]
    layers = policy_layers(policy)
    named = f"{name}_named" if looks_for_names(policy) else f"{name}_allowed"
    for index in reversed(range(len(layers))):
        accept, by_name = f"{name}_allowed", named
        if index + 1 < len(layers):
            accept, by_name = f"{own}_l{index + 1}", f"{own}_l{index + 1}_named"
        lines += _layer(name, own, index, layers[index], accept, by_name)
    return "\n".join(lines) + "\n"


def switch_policy(project: ProjectAddresses, before: InForce, after: InForce) -> str:
    """Return the change that puts a prepared policy in the place of another, which is removed.

    Addresses of names are those of the prepared policy from then on.

    Args:
        project: whose.
        before: what is in force.
        after: what was prepared.
    """
    name, own = project.device, policy_name(project, after.mark)
    lines = [f"flush chain {TABLE} {name}_forward"]
    if before.layers:
        lines += [
            f'delete element {TABLE} current {{ "{name}" . {before.mark} }}',
            f"flush chain {TABLE} {name}_named",
        ]
    lines += [f'add element {TABLE} current {{ "{name}" . {after.mark} }}']
    lines += _allowing_rules(project, after.mark)
    lines += _naming_rules(project, own, alone=after.layers == 1)
    chain = f"add rule {TABLE} {name}_forward"
    lines += [
        f'{chain} ct direction original oifname != "{UPLINK_DEVICE}" goto {name}_neighbour',
        *(
            f"{chain} ct original {ip} daddr @node{version} goto {name}_node"
            for version, (ip, _) in _FAMILIES.items()
        ),
        f"{chain} goto {own}_l0",
        *_forget(policy_name(project, before.mark), before.layers),
    ]
    return "\n".join(lines) + "\n"


def forget_policy(project: ProjectAddresses, prepared: InForce) -> str:
    """Return the change that removes a policy that was prepared and never switched to."""
    return "\n".join(_forget(policy_name(project, prepared.mark), prepared.layers)) + "\n"


def policy_name(project: ProjectAddresses, mark: int) -> str:
    """Return what the names of the chains and sets of one policy begin with."""
    return f"{project.device}_{mark}"


def policy_layers(policy: EffectivePolicy) -> list[Policy]:
    """Return the policies that all have to allow a connection."""
    return [policy.base, *policy.narrowed_by]


def claim_group(slot: int) -> int:
    """Return the log group of a project's connections to addresses of names."""
    return CLAIM_GROUP + slot


def looks_for_names(policy: EffectivePolicy) -> bool:
    """Return whether connections to addresses of names must ask for a name that is allowed."""
    closed = any(layer.posture is Posture.ALLOWLIST for layer in policy_layers(policy))
    return policy.base.check_names and closed


def _layer(name: str, own: str, index: int, policy: Policy, accept: str, by_name: str) -> list[str]:
    """Return the chains of one policy; what it allows goes to `accept`, by a name to `by_name`.

    What a policy before it has allowed by a name has a chain of its own, in which all that is
    allowed goes to `by_name`.
    """
    sets = f"{own}_l{index}"
    kinds = {"deny": Matches(), "open": Matches(), "allow": Matches()}
    for rule in policy.rules_at():
        for network in rule.networks:
            if rule.action is Action.DENY:
                kinds["deny"].add(rule, [network])
            elif index == 0 and opened_range(network) is not None:
                kinds["open"].add(rule, opened_networks(network))
            else:
                kinds["allow"].add(rule, [network])
    lines = [f"table {TABLE} {{"]
    for kind in kinds:
        for version, (_, address) in _FAMILIES.items():
            lines += [
                _set(f"{sets}_{kind}_ports{version}", f"{address} . inet_proto . inet_service"),
                _set(f"{sets}_{kind}_whole{version}", f"{address} . inet_proto"),
            ]
    names = _names_lookups(own, by_name)
    lines += _layer_chain(name, sets, policy, accept, names, hard=index == 0)
    if index > 0:
        lines += _layer_chain(name, sets, policy, by_name, names, chain=f"{sets}_named")
    lines.append("}")
    for kind, matches in kinds.items():
        for version in _FAMILIES:
            for shape, elements in (
                ("ports", matches.port_elements(version)),
                ("whole", matches.whole_elements(version)),
            ):
                if elements:
                    lines.append(_add(f"{sets}_{kind}_{shape}{version}", elements))
    return lines


def _layer_chain(
    name: str,
    sets: str,
    policy: Policy,
    accept: str,
    names: list[str],
    *,
    hard: bool = False,
    chain: str = "",
) -> list[str]:
    refused = policy.posture is Posture.ALLOWLIST
    # Of the protected ranges only the first policy opens anything; others take away.
    protected = [
        f"    ct original {ip} daddr @hard{version} goto {name}_{Stage.PROTECTED.value}"
        for version, (ip, _) in _FAMILIES.items()
    ]
    return [
        f"  chain {chain or sets} {{",
        *_lookups(f"{sets}_deny", f"{name}_{Stage.DENIED.value}"),
        *_lookups(f"{sets}_open", accept),
        *names,
        *(protected if hard else ()),
        *_lookups(f"{sets}_allow", accept),
        f"    goto {f'{name}_{Stage.DEFAULT.value}' if refused else accept}",
        "  }",
    ]


def _lookups(sets: str, target: str) -> list[str]:
    return [
        "    " + form.format(ip=ip, set=f"{sets}_{shape}{version}", target=target)
        for version, (ip, _) in _FAMILIES.items()
        for shape, form in (("ports", _PORTED), ("whole", _WHOLE))
    ]


def _names_lookups(name: str, target: str) -> list[str]:
    lines = []
    for when, sets in (("", name), ("ct state established ", past(name))):
        for version, (ip, _) in _FAMILIES.items():
            for shape, form in (("port", _PORTED), ("range", _PORTED), ("whole", _WHOLE)):
                found = form.format(ip=ip, set=f"{sets}_{shape}{version}", target=target)
                lines.append(f"    {when}{found}")
            lines.append(f"    {when}ct original {ip} daddr @{sets}_all{version} goto {target}")
    return lines


def past(name: str) -> str:
    """Return what the sets begin with that count for connections that are open already."""
    return f"{name}_past"


def _names_sets(name: str) -> str:
    """Return the sets that addresses of names go to: single ports, ranges, all ports, anything."""
    lines = []
    for version, (_, address) in _FAMILIES.items():
        for shape, kind, flags in (
            ("port", f"{address} . inet_proto . inet_service", "timeout"),
            ("range", f"{address} . inet_proto . inet_service", "interval,timeout"),
            ("whole", f"{address} . inet_proto", "timeout"),
            ("all", address, "timeout"),
        ):
            lines.append(_set(f"{name}_{shape}{version}", kind, flags, NAMES_SIZE))
    return "\n".join(lines)


def _forget(own: str, layers: int) -> list[str]:
    """Return how a policy of so many layers is removed, when nothing leads to it any more."""
    if not layers:
        return []
    chains = [f"{own}_l{index}" for index in range(layers)]
    chains += [f"{own}_l{index}_named" for index in range(1, layers)]
    lines = [f"{what} chain {TABLE} {chain}" for what in ("flush", "delete") for chain in chains]
    lines += [
        f"delete set {TABLE} {own}_l{index}_{kind}_{shape}{version}"
        for index in range(layers)
        for kind in ("deny", "open", "allow")
        for shape in ("ports", "whole")
        for version in _FAMILIES
    ]
    lines += [
        f"delete set {TABLE} {sets}_{shape}{version}"
        for sets in (own, past(own))
        for shape in ("port", "range", "whole", "all")
        for version in _FAMILIES
    ]
    return lines


def _refusing_chains(project: ProjectAddresses) -> str:
    name = project.device
    text = ""
    for stage in REFUSALS:
        # Who only receives would not hear of the end: the other side's packet becomes the reset
        # that tells it, and the next one is reset itself.
        text += f"""  chain {name}_{stage.value} {{
    ct direction reply goto cut
    counter name {name}_{stage.value}
    {_told(project, stage)}
    goto reject_it
  }}
"""
    return f"{text}  chain {name}_{Stage.ALLOWED.value} {{\n  }}\n  chain {name}_named {{\n  }}\n"


def _allowing_rules(project: ProjectAddresses, mark: int) -> list[str]:
    """Return the chain of what is allowed: connections that go on are not counted again."""
    stage = Stage.ALLOWED
    chain = f"{TABLE} {project.device}_{stage.value}"
    return [
        f"flush chain {chain}",
        f"add rule {chain} {_crowded()}",
        f"add rule {chain} ct state new counter name {project.device}_{stage.value}",
        f"add rule {chain} ct state new {_told(project, stage)}",
        f"add rule {chain} ct mark set {mark} accept",
    ]


def _naming_rules(project: ProjectAddresses, own: str, *, alone: bool) -> list[str]:
    """Return the chain of connections to addresses of names.

    Their first bytes go to the agent and no further; it sends them on once it has seen that the
    name in them is allowed, and marks the connection. Without the agent they go nowhere. Where
    there is one policy `alone`, what a rule allows by network as well is not looked into.
    """
    name = project.device
    claim = (
        f'log prefix "{LOG_PREFIX}:{project.slot}:{CLAIM_WORD}:" group {claim_group(project.slot)}'
    )
    rules = [
        f"meta l4proto != tcp goto {name}_allowed",
        *(line.strip() for line in _lookups(f"{own}_l0_allow", f"{name}_allowed") if alone),
        f"ct mark {{ {REFUSED_MARK}, {_CUT} }} goto {name}_{Stage.NAME.value}",
        f"ct mark != 0 goto {name}_allowed",
        "ct direction reply accept",
        "ct state new tcp flags & (fin | syn | rst | ack) != syn goto reject_it",
        _crowded(),
        f"ct state new {_NEW_NAMED_LIMIT} drop",
        f"ct state new {claim}",
        f"ct state new counter name {name}_{Stage.ALLOWED.value}",
        f"ct state new {_told(project, Stage.ALLOWED)}",
        "jump empty_segments",
        # Data in a SYN: without an answer to it, programs send it again in a connection.
        "ct state new drop",
        f"{_FIRST_BYTES_LIMIT} drop",
        f"{claim} drop",
    ]
    return [f"add rule {TABLE} {name}_named {rule}" for rule in rules]


def _crowded() -> str:
    # Dropped and not refused: programs try again, and some will have ended by then.
    return f"ct state new ct count over {MAX_CONNECTIONS} counter drop"


def _empty_segments() -> str:
    """Return a chain that lets TCP segments without data pass.

    nft cannot subtract, so there is a rule for each length that the options can have.
    """
    lines = []
    for words in range(5, 16):
        lines += [
            f"    ip hdrlength 5 tcp doff {words} ip length {20 + words * 4} accept",
            f"    ip6 nexthdr tcp tcp doff {words} ip6 length {words * 4} accept",
        ]
    return "\n".join(["  chain empty_segments {", *lines, "  }", ""])


def _told(project: ProjectAddresses, stage: Stage) -> str:
    return _LOG.format(f'"{LOG_PREFIX}:{project.slot}:{stage.value}:"')


def _counters(name: str) -> str:
    return "".join(f"add counter {TABLE} {name}_{stage.value}\n" for stage in Stage)


def _block_sets(name: str, networks: Sequence[Network]) -> str:
    text = ""
    for version, (_, kind) in _FAMILIES.items():
        some = ", ".join(str(one) for one in collapse(networks) if one.version == version)
        text += f"""  set {name}{version} {{
    type {kind}
    flags interval
    elements = {{ {some} }}
  }}
"""
    return text


def _empty_sets(name: str) -> str:
    return "\n".join(_set(f"{name}{version}", kind, "") for version, (_, kind) in _FAMILIES.items())


def _set(name: str, kind: str, flags: str = "interval", size: int = 0) -> str:
    lines = [f"  set {name} {{", f"    type {kind}"]
    if flags:
        lines.append(f"    flags {flags}")
    if size:
        lines.append(f"    size {size}")
    return "\n".join([*lines, "  }"])


def _add(name: str, elements: Sequence[str]) -> str:
    return f"add element {TABLE} {name} {{ {', '.join(elements)} }}"
