"""What an egress policy says, as values that never change.

How rules are understood, everywhere alike:

1. A deny rule wins over every allow rule, whatever their order and layer. One by host denies the
   name as a whole: it is not looked up.
2. Protected ranges are denied unless an allow rule names them: by a network that lies inside one
   protected range, or by a host in a rule with `private`. Some ranges can never be opened.
3. Then allow rules count, and at last the posture.

A name that a rule allows is allowed where its answers lead, except into protected ranges. A rule
by network counts for its addresses, whether a name led there or not. Rules by URL are decided in
`urlrules`; below that, only the servers count that they allow something of.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from offload_builder.egress.policy.weburl import UrlTarget, WebUrl
from offload_core.trust import join_address

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_PORT = 65535
CONNECTOR = "connector"
"""Value of `via` for names that a connector serves, which somebody runs in a private network."""


class Action(enum.Enum):
    """What a rule does with what it matches."""

    ALLOW = "allow"
    DENY = "deny"


class Posture(enum.Enum):
    """What happens with what no rule matches."""

    OPEN = "open"
    ALLOWLIST = "allowlist"


class Protocol(enum.Enum):
    """What is spoken above IP.

    `ANY` in a rule matches every protocol; with ports it matches TCP and UDP. `ANY` in an attempt
    stands for a protocol that is none of the others.
    """

    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"
    ANY = "any"


class Layer(enum.Enum):
    """Whose word a rule is."""

    POOL = "pool"
    PROJECT = "project"
    BUILD = "build"


@dataclass(frozen=True, order=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def covers(self, other: PortRange) -> bool:
        """Return whether all ports of the other are ports of this."""
        return self.first <= other.first and other.last <= self.last


@dataclass(frozen=True, order=True)
class HostTarget:
    """A host by name, or all names below a domain.

    Attributes:
        name: lower case, no dot at its end, IDNA encoded; of the domain where `wildcard`.
        wildcard: `*.name`: names with one or more labels before it, not the domain itself.
    """

    name: str
    wildcard: bool = False

    def __str__(self) -> str:
        return f"*.{self.name}" if self.wildcard else self.name

    def matches(self, host: str) -> bool:
        """Return whether a name is meant; case and a dot at its end do not matter."""
        name = normal_host(host)
        return name.endswith(f".{self.name}") if self.wildcard else name == self.name

    def covers(self, other: HostTarget) -> bool:
        """Return whether every name of the other is one of this."""
        if not self.wildcard:
            return self == other
        below = other.name.endswith(f".{self.name}")
        return below or (other.wildcard and other.name == self.name)


@dataclass(frozen=True)
class NetworkTarget:
    """Addresses, as a network without host bits; one address is a network as well."""

    network: Network

    def __str__(self) -> str:
        if self.network.prefixlen == self.network.max_prefixlen:
            return str(self.network.network_address)
        return str(self.network)

    def matches(self, address: Address) -> bool:
        """Return whether an address is meant."""
        return address in self.network

    def covers(self, other: NetworkTarget) -> bool:
        """Return whether every address of the other is one of this."""
        return within(other.network, self.network)


Target = HostTarget | NetworkTarget | UrlTarget


@dataclass(frozen=True)
class Place:
    """Where something is written. Line 0 is for what is in no file."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


BUILT_IN = Place("built in")


@dataclass(frozen=True)
class Rule:
    """One rule of a policy.

    Attributes:
        id: letters, digits and dashes, at most 40; unique in its policy.
        targets: at least one; hosts and networks may stand together, URLs stand alone.
        ports: of the destination; empty for all, and for URLs, which have their own.
        protocol: `ICMP` has no ports.
        comment: why there is the rule.
        owner: whom to ask about it.
        expires: the rule does not count from then on; None for never.
        private: names of this rule may lead into the protected ranges of `PRIVATE_KINDS`.
        via: `CONNECTOR` where its names are reached through a connector only; else empty.
        place: where it is written.
        layer: whose word it is.
        preset: name of the preset that it comes from; empty for none.
    """

    id: str
    action: Action
    targets: tuple[Target, ...]
    ports: tuple[PortRange, ...] = ()
    protocol: Protocol = Protocol.TCP
    comment: str = ""
    owner: str = ""
    expires: datetime | None = None
    private: bool = False
    via: str = ""
    place: Place = BUILT_IN
    layer: Layer = Layer.POOL
    preset: str = ""

    def __str__(self) -> str:
        words = [self.action.value, ", ".join(str(target) for target in self.targets)]
        if self.ports:
            word = "port" if len(self.ports) == 1 and "-" not in str(self.ports[0]) else "ports"
            words.append(f"{word} {', '.join(str(ports) for ports in self.ports)}")
        if self.protocol is not Protocol.ANY and not self.urls:
            words.append(self.protocol.value)
        if self.via:
            words.append(f"via {self.via}")
        return " ".join(words)

    @property
    def hosts(self) -> tuple[HostTarget, ...]:
        """The targets by name."""
        return tuple(target for target in self.targets if isinstance(target, HostTarget))

    @property
    def networks(self) -> tuple[Network, ...]:
        """The targets by address."""
        return tuple(target.network for target in self.targets if isinstance(target, NetworkTarget))

    @property
    def urls(self) -> tuple[UrlTarget, ...]:
        """The targets by URL; if there are any, there are no others."""
        return tuple(target for target in self.targets if isinstance(target, UrlTarget))

    def holds_at(self, now: datetime) -> bool:
        """Return whether the rule has not ended."""
        return self.expires is None or now < self.expires

    def speaks(self, protocol: Protocol, port: int | None) -> bool:
        """Return whether a protocol and a port are meant. Port None is for what has no ports."""
        if self.protocol not in (Protocol.ANY, protocol):
            return False
        if not self.ports:
            return True
        return port is not None and any(port in ports for ports in self.ports)


@dataclass(frozen=True)
class ProtectedRange:
    """Addresses that are denied unless a rule names them.

    Attributes:
        kind: for rule ids: `protected-KIND`.
        openable: an allow rule can open it, or a part of it.
    """

    kind: str
    network: Network
    about: str
    openable: bool = True


def _protected(kind: str, network: str, about: str, *, openable: bool = True) -> ProtectedRange:
    return ProtectedRange(kind, ipaddress.ip_network(network), about, openable)


PROTECTED_V4: tuple[ProtectedRange, ...] = (
    _protected("metadata", "169.254.169.254/32", "metadata service of clouds"),
    _protected("metadata", "169.254.170.2/32", "credentials service of container clouds"),
    _protected("metadata", "169.254.170.23/32", "credentials service of container clouds"),
    _protected("metadata", "100.100.100.200/32", "metadata service of clouds"),
    _protected("metadata", "168.63.129.16/32", "platform service of a cloud"),
    _protected("private", "10.0.0.0/8", "private network, RFC 1918"),
    _protected("private", "172.16.0.0/12", "private network, RFC 1918"),
    _protected("private", "192.168.0.0/16", "private network, RFC 1918"),
    _protected("cgnat", "100.64.0.0/10", "carrier-grade NAT, RFC 6598"),
    _protected("loopback", "127.0.0.0/8", "the node itself, RFC 1122", openable=False),
    _protected("link-local", "169.254.0.0/16", "link-local, RFC 3927"),
    _protected("reserved", "0.0.0.0/8", "this network, RFC 791", openable=False),
    _protected("reserved", "192.0.0.0/24", "protocol assignments, RFC 6890"),
    _protected("reserved", "198.18.0.0/15", "benchmarks, RFC 2544"),
    _protected("multicast", "224.0.0.0/4", "multicast, RFC 5771", openable=False),
    _protected("reserved", "240.0.0.0/4", "reserved and broadcast, RFC 1112", openable=False),
)
PROTECTED_V6: tuple[ProtectedRange, ...] = (
    _protected("metadata", "fd00:ec2::254/128", "metadata service of clouds"),
    _protected("metadata", "fd00:ec2::23/128", "credentials service of container clouds"),
    _protected("metadata", "fd20:ce::254/128", "metadata service of clouds"),
    _protected("private", "fc00::/7", "unique local addresses, RFC 4193"),
    _protected("loopback", "::1/128", "the node itself, RFC 4291", openable=False),
    _protected("reserved", "::/128", "no address, RFC 4291", openable=False),
    _protected("reserved", "::/96", "IPv4-compatible, RFC 4291", openable=False),
    _protected("v4-mapped", "::ffff:0:0/96", "IPv4 in IPv6, RFC 4291", openable=False),
    _protected("nat64", "64:ff9b::/96", "IPv4 through NAT64, RFC 6052", openable=False),
    _protected("nat64", "64:ff9b:1::/48", "IPv4 through local NAT64, RFC 8215", openable=False),
    _protected("reserved", "100::/64", "discard only, RFC 6666", openable=False),
    _protected("reserved", "2001::/32", "Teredo, RFC 4380", openable=False),
    _protected("6to4", "2002::/16", "IPv4 through 6to4, RFC 3056", openable=False),
    _protected("link-local", "fe80::/10", "link-local, RFC 4291", openable=False),
    _protected("private", "fec0::/10", "site-local, RFC 3879"),
    _protected("multicast", "ff00::/8", "multicast, RFC 4291", openable=False),
)
PROTECTED: tuple[ProtectedRange, ...] = PROTECTED_V4 + PROTECTED_V6
"""The first that has an address says what the address is: narrow ranges come before wide ones."""
PRIVATE_KINDS = frozenset({"private", "cgnat"})
"""Where names of a rule with `private` may lead; the rest is opened by networks only."""


@dataclass(frozen=True)
class Opening:
    """What projects may allow by themselves.

    Attributes:
        public: every destination outside of the protected ranges.
        targets: these, and what lies below; networks may lie in protected ranges.
    """

    public: bool = False
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What one file says: of a pool, of a project, or of a build.

    A merged policy of a pool and a project is one as well; its rules keep their layer and place.

    Attributes:
        posture: None in the file of a project, which takes the pool's.
        rules: own ones and those of presets, in their order; ids are unique.
        presets: names, as the file has them.
        name: of the pool or the project, for sentences.
        contact: whom to ask for more, for sentences; empty when not said.
        may_allow: what projects may allow; only in the policy of a pool.
        proxied: steps run behind BuildKit's proxy, which passes HTTP only.
        check_names: connections to addresses of names are looked into for the name.
        version: number in the gateway's store; 0 for what is not from there.
        source: name of the file.
    """

    posture: Posture | None = Posture.OPEN
    rules: tuple[Rule, ...] = ()
    presets: tuple[str, ...] = ()
    layer: Layer = Layer.POOL
    name: str = ""
    contact: str = ""
    may_allow: Opening = field(default_factory=Opening)
    proxied: bool = False
    check_names: bool = True
    version: int = 0
    source: str = "built in"

    def rules_at(self, now: datetime | None = None) -> tuple[Rule, ...]:
        """Return the rules that count at a time; now by default."""
        moment = now or datetime.now(UTC)
        return tuple(rule for rule in self.rules if rule.holds_at(moment))

    def next_change(self, now: datetime | None = None) -> datetime | None:
        """Return when the next rule ends by itself; None when none does."""
        ends = [rule.expires for rule in self.rules_at(now) if rule.expires is not None]
        return min(ends, default=None)

    def with_rules(self, rules: tuple[Rule, ...]) -> Policy:
        """Return this policy with more rules, such as those of configured registries."""
        return replace(self, rules=self.rules + rules)


DEFAULT_POLICY = Policy()
"""Where nobody wrote a policy: open, but for the protected ranges."""


@dataclass(frozen=True)
class EffectivePolicy:
    """What holds for a build: allowed is what `base` and every one of `narrowed_by` allow.

    Attributes:
        base: pool and project, merged.
        narrowed_by: policies that builds brought; they can only take away.
    """

    base: Policy = DEFAULT_POLICY
    narrowed_by: tuple[Policy, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """Somebody wants to reach something.

    Attributes:
        host: the name that was looked up; None for an address that no name led to.
        address: None where the name has not been looked up yet.
        port: None for protocols without ports, and for the lookup of a name.
        url: what is wanted there, where that is known.
    """

    host: str | None
    address: Address | None
    port: int | None
    protocol: Protocol = Protocol.TCP
    url: WebUrl | None = None

    def __str__(self) -> str:
        if self.url is not None:
            return str(self.url)
        where = self.host or str(self.address)
        if self.port is not None:
            where = join_address(where, self.port)
        return where if self.protocol is Protocol.TCP else f"{where} ({self.protocol.value})"


@dataclass(frozen=True)
class Verdict:
    """What a policy says about an attempt.

    Attributes:
        rule_id: of the rule that decided, `protected-KIND`, `default-deny` or `default-allow`.
        rule_text: the rule in one line.
        place: where it is written.
        reason: one sentence for people.
        layer: whose word it was.
    """

    allowed: bool
    rule_id: str
    rule_text: str
    place: Place
    reason: str
    layer: Layer = Layer.POOL


def normal_host(host: str) -> str:
    """Return a name as policies have it: lower case, no dot at its end."""
    return host.rstrip(".").lower()


def within(inner: Network, outer: Network) -> bool:
    """Return whether a network lies inside another, also of the other family (then not)."""
    if inner.version != outer.version or inner.prefixlen < outer.prefixlen:
        return False
    shift = outer.max_prefixlen - outer.prefixlen
    return int(inner.network_address) >> shift == int(outer.network_address) >> shift


_Mask = tuple[int, int, int, ProtectedRange]


def _masks(family: int) -> tuple[tuple[_Mask, ...], ...]:
    """Return by the first byte of an address which protected ranges may have it."""
    found: list[list[_Mask]] = [[] for _ in range(256)]
    for item in PROTECTED:
        if item.network.version != family:
            continue
        length = item.network.prefixlen
        shift = item.network.max_prefixlen - length
        prefix = int(item.network.network_address) >> shift
        for byte, masks in enumerate(found):
            begins = prefix >> length - 8 == byte if length > 8 else prefix == byte >> 8 - length
            if begins:
                masks.append((length, shift, prefix, item))
    return tuple(tuple(masks) for masks in found)


# Of each protected range: length of its prefix, bits behind it, the prefix as a number. Policies
# of thousands of rules ask for each of their networks, and next to none has a byte of such a range.
_MASKS = {4: _masks(4), 6: _masks(6)}


def protected_range(
    address: Address, guarded: tuple[ProtectedRange, ...] = ()
) -> ProtectedRange | None:
    """Return the protected range that has an address; `guarded` ones, of the node, come first."""
    for item in guarded:
        if address in item.network:
            return item
    number = int(address)
    byte = number >> address.max_prefixlen - 8
    for _, shift, prefix, item in _MASKS[address.version][byte]:
        if number >> shift == prefix:
            return item
    return None


def opened_range(network: Network) -> ProtectedRange | None:
    """Return the protected range that a network of an allow rule lies in: the rule names it."""
    number = int(network.network_address)
    byte = number >> network.max_prefixlen - 8
    for length, shift, prefix, item in _MASKS[network.version][byte]:
        if network.prefixlen >= length and number >> shift == prefix:
            return item
    return None


def opened_networks(network: Network) -> tuple[Network, ...]:
    """Return what a network of an allow rule opens of the protected ranges; () for a public one.

    A rule for a wide range does not name the narrow ones in it: who allows 100.64.0.0/10 has not
    allowed the metadata service at 100.100.100.200.
    """
    found = opened_range(network)
    if found is None or not found.openable:
        return ()
    left: list[Network] = [network]
    for item in PROTECTED:
        if item is found or not within(item.network, network):
            continue
        left = [part for whole in left for part in _without(whole, item.network)]
    return tuple(left)


def _without(whole: Network, hole: Network) -> list[Network]:
    if not within(hole, whole):
        return [whole]
    if isinstance(whole, ipaddress.IPv4Network) and isinstance(hole, ipaddress.IPv4Network):
        return list(whole.address_exclude(hole))
    if isinstance(whole, ipaddress.IPv6Network) and isinstance(hole, ipaddress.IPv6Network):
        return list(whole.address_exclude(hole))
    return [whole]
